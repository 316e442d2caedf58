package main

import (
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"nsalloc": main,
		// For looking at output by hand: NSALLOC_SERVER=unix:///tmp/x.sock
		"fakepool": func() {
			l, err := net.Listen("unix", os.Args[1])
			if err != nil {
				panic(err)
			}
			(&fake{records: recorded()}).on(l)
			stop := make(chan os.Signal, 1)
			signal.Notify(stop, os.Interrupt)
			<-stop
		},
		"nsalloc-server": func() { fakeDaemon("--listen") },
		"nsalloc-agent":  func() { fakeDaemon("--config") },
	})
}

// TestStories runs testdata/*.txtar: what people type and what they get.
func TestStories(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		UpdateScripts:       os.Getenv("UPDATE") != "",
		RequireExplicitExec: true,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":     exits,
			"jsonpaths": jsonPaths,
		},
		Setup: func(env *testscript.Env) error {
			// Sockets have short paths; a story's directory has a long one.
			dir, err := os.MkdirTemp("", "ns")
			if err != nil {
				return err
			}
			env.Defer(func() { os.RemoveAll(dir) })
			for name, f := range map[string]*fake{
				"pool.sock":   {records: recorded()},
				"broken.sock": {records: broken()},
				"away.sock":   {records: recorded(), away: true},
				"fenced.sock": {records: recorded(), fenced: true},
				"down.sock":   {records: recorded(), down: true},
				"copied.sock": {records: recorded(), replaced: 5},
				"empty.sock":  {records: records{pool: recorded().pool}},
			} {
				l, err := net.Listen("unix", filepath.Join(dir, name))
				if err != nil {
					return err
				}
				env.Defer(f.on(l).Stop)
			}
			self, err := exec.LookPath("nsalloc")
			if err != nil {
				return err
			}
			env.Setenv("BIN", filepath.Dir(self))
			env.Setenv("SOCKETS", dir)
			env.Setenv("NSALLOC_SERVER", "unix://"+dir+"/pool.sock")
			env.Setenv("NSALLOC_AGENT", "unix://"+dir+"/pool.sock")
			env.Setenv("TZ", "UTC")
			return nil
		},
	})
}

// exits runs a command that has to end with a code: exits 3 nsalloc ...
func exits(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	if e, ok := errors.AsType[*exec.ExitError](err); ok {
		got = e.ExitCode()
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// jsonPaths checks that a document has values at paths: jsonpaths FILE a.0.b ...
func jsonPaths(ts *testscript.TestScript, _ bool, args []string) {
	var doc any
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[0])), &doc))
	for _, path := range args[1:] {
		at := doc
		for step := range strings.SplitSeq(path, ".") {
			ok := false
			switch v := at.(type) {
			case map[string]any:
				at, ok = v[step]
			case []any:
				i, err := strconv.Atoi(step)
				if ok = err == nil && i < len(v); ok {
					at = v[i]
				}
			}
			if !ok {
				ts.Fatalf("%s: nothing at %s (%q)", args[0], path, step)
			}
		}
	}
}
