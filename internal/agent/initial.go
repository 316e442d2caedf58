package agent

import (
	"os"
	"path/filepath"
)

// initialInodes are the kernel's own numbers for the namespaces that a machine boots with
// (include/linux/proc_ns.h).
var initialInodes = []struct{ name, link string }{
	{"pid", "pid:[4026531836]"},
	{"user", "user:[4026531837]"},
}

// notInitial names the namespaces below dir that are not those the machine booted with, of the two that
// make a container of whoever is in others. One that cannot be read is left out.
func notInitial(dir string) []string {
	var outside []string
	for _, n := range initialInodes {
		if link, err := os.Readlink(filepath.Join(dir, n.name)); err == nil && link != n.link {
			outside = append(outside, link)
		}
	}
	return outside
}
