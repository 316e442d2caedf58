//go:build linux

// Command nsalloc-hook is what CRIU runs at each point of a dump and of a restore: it tells the agent of
// this host, and stops CRIU if the agent says so. It decides nothing itself.
//
// To install it, name it in /etc/criu/default.conf, which CRIU reads whoever starts it:
//
//	action-script /usr/libexec/nsalloc-hook
//
// It stands there by itself, not in a shell script: its parent has to be CRIU. CRIU takes several
// action-script lines.
//
// # What it heeds
//
// CRTOOLS_SCRIPT_ACTION, CRTOOLS_IMAGE_DIR and CRTOOLS_INIT_PID, two fixed paths, and its parent. No
// other variable and no argument (but --version) changes what it does. The Go runtime, which starts
// before main, reads a few of its own: GODEBUG, GOGC, GOMEMLIMIT, GOMAXPROCS and GOTRACEBACK can make
// the hook slower or print more. With nonsense in GOMEMLIMIT or GOMAXPROCS it dies at once, which CRIU
// takes as a veto. Who can set these already runs CRIU as root.
//
// # Exit code
//
// 0 lets CRIU go on, 1 stops it at the points where it can be stopped. On a host without
// /etc/nsalloc/agent.yaml it is always 0. Without CRTOOLS_SCRIPT_ACTION, that is if anybody but CRIU
// started it, it is 1.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/nsalloc/nsalloc/internal/killpoint"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// The linker can set these (-X): the version in every build, the paths in tests only.
var (
	version    = "dev"
	configPath = criuhook.ConfigPath
	socketPath = criuhook.SocketPath
	bypassPath = criuhook.BypassPath
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == "--version" {
		fmt.Println("nsalloc-hook", version)
		return
	}
	// Descriptors 0 to 2 are open from here on, whatever CRIU closed: the runtime opens /dev/null for
	// those that are not (checkfds in its fds_unix.go), so that no socket lands there.
	var st syscall.Stat_t
	if err := syscall.Stat(configPath, &st); errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ENOTDIR) {
		return
	}
	name := os.Getenv("CRTOOLS_SCRIPT_ACTION")
	if name == "" {
		say("this is what CRIU runs during a dump or restore, not a command for people: \"nsalloc hook install\" puts it into /etc/criu/default.conf")
		os.Exit(1)
	}
	stage, known := criuhook.StageOf(criuhook.Action(name))
	if !known {
		return // a later CRIU's; nothing is known of what a veto would do
	}
	d := run(stage.Action)
	if d.Message != "" {
		say(name + ": " + d.Message)
	}
	if d.Veto {
		os.Exit(1)
	}
}

func run(a criuhook.Action) (d criuhook.Decision) {
	// A crash would exit with 2 and a page of stack in CRIU's log.
	defer func() {
		if r := recover(); r != nil {
			d = criuhook.Decide(a, criuhook.Response{}, fmt.Errorf("nsalloc-hook crashed, please report it: %v", r), bypassed())
		}
	}()
	request, fds := look(a, os.Getenv("CRTOOLS_IMAGE_DIR"), os.Getenv("CRTOOLS_INIT_PID"))
	killpoint.At(killpoint.HookAsking.Of(string(a)))
	answer, err := criuhook.Ask(context.Background(), socketPath, request, fds...)
	killpoint.At(killpoint.HookAnswered.Of(string(a)))
	return criuhook.Decide(a, answer, err, err != nil && bypassed())
}

func bypassed() bool {
	var st syscall.Stat_t
	return syscall.Stat(bypassPath, &st) == nil
}

// say writes one line to CRIU's log. Not through os.Stderr: that turns a broken pipe into the death of
// this process, and a pass with a warning into a veto. That nobody reads it changes nothing.
func say(text string) { _, _ = syscall.Write(2, []byte("nsalloc: "+text+"\n")) }
