package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// The oldest CRIU that takes scripts and RPC together: before, it runs into a BUG_ON.
const (
	minCRIUMajor = 3
	minCRIUMinor = 19
)

var criuVersion = regexp.MustCompile(`(?m)^Version: (\d+)\.(\d+)(\.\S+)?`)

func (e *examination) criu(ctx context.Context) checkup {
	path, err := exec.LookPath("criu")
	if err != nil {
		return bad(fmt.Sprintf("install criu %d.%d or later", minCRIUMajor, minCRIUMinor), "no criu in PATH")
	}
	out, err := runCRIU(ctx, path, "--version")
	if err != nil {
		// Old builds fail on new kernels before they print anything (the vDSO of Linux 6.18).
		return bad("install a newer criu: this one does not run on this kernel", "%s does not start: %v", path, err)
	}
	m := criuVersion.FindStringSubmatch(out)
	if m == nil {
		return doubtful("look at `criu --version`", "%s says %q, which is not a version", path, firstLine(out))
	}
	major, _ := strconv.Atoi(m[1])
	minor, _ := strconv.Atoi(m[2])
	version := strings.TrimPrefix(m[0], "Version: ")
	switch {
	case major < minCRIUMajor || major == minCRIUMajor && minor < minCRIUMinor:
		return bad(fmt.Sprintf("install criu %d.%d or later: older ones crash when a script and a runtime talk to them at once", minCRIUMajor, minCRIUMinor),
			"%s is version %s", path, version)
	case major < 4 || major == 4 && minor < 1:
		return doubtful("criu 4.1 or later writes a run id, by which images without a manifest are found", "%s is version %s: its images have no run id", path, version)
	}
	return good("%s, version %s", path, version)
}

func (e *examination) criuCheck(ctx context.Context) checkup {
	path, err := exec.LookPath("criu")
	if err != nil {
		return skipped("no criu in PATH")
	}
	out, err := runCRIU(ctx, path, "check")
	if err != nil {
		return bad("`criu check` as root says what this kernel lacks", "criu check: %v", err)
	}
	if !strings.Contains(out, "Looks good") {
		return doubtful("look at `criu check`", "criu check: %s", firstLine(out))
	}
	return good("criu check: %s", firstLine(out))
}

// runCRIU returns what CRIU printed, or an error with its last words.
func runCRIU(ctx context.Context, path string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.WaitDelay = time.Second
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if err == nil {
		return out.String() + errs.String(), nil
	}
	if ctx.Err() != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return "", fmt.Errorf("no answer within 20s")
	}
	if said := lastLine(errs.String() + out.String()); said != "" {
		return "", fmt.Errorf("%w: %s", err, said)
	}
	return "", err
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}
