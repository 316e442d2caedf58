package testhost

import (
	"bufio"
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestCommand(t *testing.T) {
	p := newPool(t, "a")
	a := p.Host("a")
	ctx := testContext(t, time.Minute)

	cmd := a.Command(ctx, "sh", "-c", "cat; echo $X >&2; exit 7")
	var errs strings.Builder
	cmd.Stdin, cmd.Stderr = strings.NewReader("in"), &errs
	cmd.Env = append(cmd.Env, "X=y")
	out, err := cmd.Output()
	if string(out) != "in" || errs.String() != "y\n" || cmd.ProcessState.ExitCode() != 7 {
		t.Errorf("stdout %q, stderr %q, %v", out, errs.String(), err)
	}

	errs.Reset()
	cmd = a.Command(ctx, "no-such-program")
	cmd.Stderr = &errs
	if _ = cmd.Run(); cmd.ProcessState.ExitCode() != 127 || !strings.Contains(errs.String(), "no-such-program") {
		t.Errorf("unknown program: %v, %q", cmd.ProcessState, errs.String())
	}

	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd = a.Command(ctx, "sh", "-c", "echo extra >&3")
	cmd.ExtraFiles = []*os.File{w}
	if err := cmd.Run(); err != nil {
		t.Error(err)
	}
	_ = w.Close()
	if line, err := bufio.NewReader(r).ReadString('\n'); line != "extra\n" {
		t.Errorf("extra file: %q, %v", line, err)
	}
	_ = r.Close()

	cmd = a.Command(ctx, "sh", "-c", `trap "echo term; exit 3" TERM; echo ready; while :; do sleep 0.01; done`)
	stdout := started(t, cmd)
	_ = cmd.Process.Signal(unix.SIGTERM)
	if line, _ := stdout.ReadString('\n'); line != "term\n" {
		t.Errorf("after SIGTERM: %q", line)
	}
	if _ = cmd.Wait(); cmd.ProcessState.ExitCode() != 3 {
		t.Errorf("after SIGTERM: %v", cmd.ProcessState)
	}

	cmd = a.Command(ctx, "sh", "-c", "kill -USR1 $$")
	_ = cmd.Run()
	if ws := cmd.ProcessState.Sys().(syscall.WaitStatus); !ws.Signaled() || ws.Signal() != unix.SIGUSR1 {
		t.Errorf("command that a signal ended: %v", cmd.ProcessState)
	}
}

// started starts a command and waits for its first line.
func started(t *testing.T, cmd *exec.Cmd) *bufio.Reader {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(out)
	if line, err := r.ReadString('\n'); line != "ready\n" {
		t.Fatalf("first line %q, %v", line, err)
	}
	return r
}

func TestCommandKilled(t *testing.T) {
	p := newPool(t, "a")
	a := p.Host("a")
	const script = "echo $$ >/run/p; echo ready; sleep 1000; :"
	alive := func() error {
		b, err := a.ReadFile("/run/p")
		if err != nil {
			return err
		}
		if _, err := a.ReadFile("/proc/" + strings.TrimSpace(string(b)) + "/comm"); err == nil {
			return errors.New("the command is alive")
		}
		return nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	cmd := a.Command(ctx, "sh", "-c", script)
	started(t, cmd)
	cancel()
	if err := cmd.Wait(); err == nil {
		t.Error("a cancelled command succeeded")
	}
	if err := alive(); err != nil {
		t.Errorf("after Wait: %v", err)
	}

	cmd = a.Command(t.Context(), "sh", "-c", script)
	started(t, cmd)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	eventually(t, "relay killed", alive)

	cmd = a.Command(t.Context(), "sh", "-c", script)
	started(t, cmd)
	if err := a.Halt(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("a command survived its host")
	}
}
