//go:build killpoints

package killpoint

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// Enabled reports whether this binary has points.
const Enabled = true

// dir is read once: what a test arms, it arms in there.
var dir = os.Getenv(Env)

// At ends the process when p is armed, and never returns then.
func At(p Point) {
	if !take(string(p)) {
		return
	}
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {} // the signal is on its way
}

// Of is the member of a family.
func (p Point) Of(what string) Point { return Point(strings.Replace(string(p), "*", what, 1)) }

// Lose reports whether a test wants the store's next answer to a commit of an RPC lost: it takes the
// file lose/RPC.
func Lose(rpc string) bool { return take("lose/" + rpc) }

// take renames a file to what it is called when it was taken. Of several who try, one succeeds.
func take(name string) bool {
	if dir == "" {
		return false
	}
	path := filepath.Join(dir, filepath.FromSlash(name))
	return os.Rename(path, path+".hit") == nil
}
