// Package nsalloc_test holds the architecture: what may import what, and a few rules
// about files that no linter knows. Every rule has its reason, and a failure prints it.
//
// The tests read the source with go/parser and never build it, so they see every file
// whatever its build tags, point at a line, and pass while a package is not there yet.
package nsalloc_test

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/nsalloc/nsalloc"

// closed packages import the standard library and what is listed; their tests are free.
// Paths are relative to the module. As in the go command, "p/..." is p and all below it.
var closed = []struct {
	pkg string
	may []string
	why string
}{
	{"pkg/alloc", nil,
		"the domain is pure: its rules can be read, tested and reused without gRPC, etcd or a kernel"},
	{"pkg/criuhook", []string{"pkg/alloc", "internal/killpoint", "golang.org/x/sys/..."},
		"the hook links this package and must start in a few milliseconds, also on a host in trouble"},
	{"cmd/nsalloc-hook/...", []string{"pkg/alloc", "pkg/criuhook", "internal/killpoint", "cmd/nsalloc-hook/..."},
		"CRIU waits for the hook with a frozen container: no gRPC, no protobuf, no flag library"},
}

// reserved packages are imported by those listed, and by themselves, only.
var reserved = []struct {
	pkg   string
	by    []string
	tests bool // does the rule hold for test files too?
	why   string
}{
	{"cmd/...", nil, true,
		"commands tie everything together; nothing below them knows that they exist"},
	{"internal/killpoint", []string{"cmd/nsalloc-hook", "internal/server", "internal/witness", "internal/agent", "internal/testpool", "pkg/criuhook", "e2e"}, true,
		"only what writes or answers can be ended by a test; without the tag it is nothing, so that pkg/criuhook may import it"},
	{"internal/...", []string{"cmd/...", "e2e/...", "pkg/criuhook"}, false,
		"direction is cmd -> internal -> pkg; programs of others import pkg and must not drag the service in"},
	{"internal/server/...", []string{"cmd/..."}, false,
		"only a command starts the service; an agent speaks gRPC to it, so that the two can be upgraded apart"},
	{"internal/agent/...", []string{"cmd/..."}, false,
		"only a command starts the daemon; a server never reaches into a host"},
	{"api/proto/...", []string{"internal/server/...", "internal/agent/...", "pkg/client/...", "cmd/...", "internal/testpool/...", "internal/bench", "e2e/..."}, true,
		"the wire format is converted once at each edge; the domain must not learn protobuf"},
	{"internal/storepb/...", []string{"internal/etcdstore/..."}, true,
		"what the store keeps is one package's secret: only then can its format change"},
	{"go.etcd.io/etcd/client/v3/...", []string{"internal/etcdstore/...", "internal/bench", "e2e/etcd"}, false,
		"all transactions are in one package, where their guards can be read side by side; what we measure ourselves against is apart, and so is an etcd's own backup"},
	{"go.etcd.io/etcd/server/v3/...", []string{"internal/etcdembed/...", "e2e/..."}, true,
		"etcd's server is a large dependency and writes global state; one package wraps it"},
	{"go.etcd.io/etcd/etcdutl/v3/...", []string{"e2e/..."}, true,
		"it writes an etcd's data from outside: only tests put an etcd back, what runs a pool never does"},
}

// nameless says nothing about what a package is for, so everything ends up in it.
var nameless = []string{"util", "utils", "common", "helper", "helpers", "manager", "misc"}

// A file this long does more than one thing.
const maxLines = 500

func TestImports(t *testing.T) {
	for _, f := range source(t) {
		for _, imp := range f.ast.Imports {
			imported, err := strconv.Unquote(imp.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			for _, why := range violations(f.pkg, strings.TrimPrefix(imported, module+"/"), f.test) {
				t.Errorf("%s: %s must not import %s: %s", f.at(imp), f.pkg, imported, why)
			}
		}
	}
}

// violations returns the reason of every rule that forbids the import.
func violations(pkg, imported string, test bool) (reasons []string) {
	for _, r := range closed {
		if matches(pkg, r.pkg) && !test && !isStandard(imported) && !matches(imported, r.may...) {
			reasons = append(reasons, r.why)
		}
	}
	for _, r := range reserved {
		if matches(imported, r.pkg) && (r.tests || !test) && !matches(pkg, r.pkg) && !matches(pkg, r.by...) {
			reasons = append(reasons, r.why)
		}
	}
	return reasons
}

// TestRules proves that the tables above forbid what they are for.
func TestRules(t *testing.T) {
	for _, c := range []struct {
		pkg, imported string
		test, ok      bool
	}{
		{"pkg/alloc", "context", false, true},
		{"pkg/alloc", "pkg/alloc/alloctest", false, false},
		{"pkg/alloc", "pgregory.net/rapid", false, false},
		{"pkg/alloc", "pgregory.net/rapid", true, true},
		{"pkg/alloc/alloctest", "pgregory.net/rapid", false, true},
		{"pkg/criuhook", "golang.org/x/sys/unix", false, true},
		{"pkg/criuhook", "google.golang.org/grpc", false, false},
		{"pkg/criuhook", "internal/killpoint", false, true},
		{"pkg/criuhook", "internal/agentconf", false, false},
		{"pkg/criuhook/notify", "internal/killpoint", false, false},
		{"pkg/alloc", "internal/killpoint", false, false},
		{"pkg/criuhook/notify", "github.com/checkpoint-restore/go-criu/v7", false, true},
		{"pkg/client", "internal/identity", false, false},
		{"pkg/client", "api/proto/nsalloc/v1", false, true},
		{"cmd/nsalloc-hook", "pkg/criuhook", false, true},
		{"cmd/nsalloc-hook", "pkg/client", false, false},
		{"cmd/nsalloc-hook", "api/proto/nsalloc/v1", false, false},
		{"cmd/nsalloc-server", "internal/server", false, true},
		{"internal/agent", "internal/server", false, false},
		{"internal/server", "internal/agent/state", false, false},
		{"internal/server", "internal/etcdstore", false, true},
		{"internal/server", "internal/storepb", true, false},
		{"internal/server", "go.etcd.io/etcd/client/v3", false, false},
		{"internal/etcdstore", "go.etcd.io/etcd/client/v3/concurrency", false, true},
		{"internal/etcdstore", "go.etcd.io/etcd/server/v3/embed", true, false},
		{"internal/etcdembed", "go.etcd.io/etcd/server/v3/embed", false, true},
		{"internal/kernelns", "cmd/nsalloc", true, false},
	} {
		if got := violations(c.pkg, c.imported, c.test); (len(got) == 0) != c.ok {
			t.Errorf("%s imports %s (test file: %v): violations %q", c.pkg, c.imported, c.test, got)
		}
	}
}

func TestPackageComments(t *testing.T) {
	written := map[string][]string{} // package -> files with a package comment
	for _, f := range source(t) {
		if f.test && !strings.HasPrefix(f.pkg, "e2e") && f.pkg != "." {
			continue // the comment belongs to the package under test
		}
		if f.generated {
			continue // the comment is in the .proto
		}
		if _, seen := written[f.pkg]; !seen {
			written[f.pkg] = nil
		}
		if f.ast.Doc != nil {
			written[f.pkg] = append(written[f.pkg], f.path)
		}
	}
	for pkg, files := range written {
		if len(files) != 1 {
			t.Errorf("%s: package comments in %q, want exactly one: it says why the package exists and what a caller must know", pkg, files)
		}
	}
}

func TestPackageNames(t *testing.T) {
	for _, f := range source(t) {
		if name := strings.TrimSuffix(f.ast.Name.Name, "_test"); slices.Contains(nameless, name) {
			t.Errorf("%s: package %s: name it after what it provides", f.path, name)
		}
	}
}

func TestFileLength(t *testing.T) {
	for _, f := range source(t) {
		if f.lines > maxLines && !f.generated {
			t.Errorf("%s: %d lines, at most %d: split it by what it does", f.path, f.lines, maxLines)
		}
	}
}

func TestNoSleep(t *testing.T) {
	for _, f := range source(t) {
		if f.test || f.generated {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			if sel, ok := n.(*ast.SelectorExpr); ok && sel.Sel.Name == "Sleep" {
				if x, ok := sel.X.(*ast.Ident); ok && x.Name == "time" {
					t.Errorf("%s: time.Sleep cannot be cancelled, and hides what is waited for: use a timer and the context", f.at(sel))
				}
			}
			return true
		})
	}
}

// matches reports whether the package is one that the patterns name.
func matches(pkg string, patterns ...string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		root, below := strings.CutSuffix(p, "/...")
		return pkg == root || below && strings.HasPrefix(pkg, root+"/")
	})
}

// isStandard relies on what the go command relies on: only the standard library has
// import paths whose first element has no dot. Our own are listed by their directory.
func isStandard(imported string) bool {
	first, _, _ := strings.Cut(imported, "/")
	return !strings.Contains(first, ".") && !slices.Contains([]string{"api", "cmd", "e2e", "internal", "pkg"}, first)
}

// file is one parsed Go file of the module.
type file struct {
	path      string // relative to the module
	pkg       string // its directory
	test      bool
	generated bool
	lines     int
	ast       *ast.File
	fset      *token.FileSet
}

func (f file) at(n ast.Node) string {
	return fmt.Sprintf("%s:%d", f.path, f.fset.Position(n.Pos()).Line)
}

// source parses all Go files of this module, and none of the modules nested in it.
func source(t *testing.T) (files []file) {
	t.Helper()
	fset := token.NewFileSet()
	err := filepath.WalkDir(".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if p != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || isModule(p)) {
				return filepath.SkipDir
			}
			return nil
		}
		if filepath.Ext(p) != ".go" {
			return nil
		}
		text, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		parsed, err := parser.ParseFile(fset, p, text, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		files = append(files, file{
			path:      filepath.ToSlash(p),
			pkg:       filepath.ToSlash(filepath.Dir(p)),
			test:      strings.HasSuffix(p, "_test.go"),
			generated: ast.IsGenerated(parsed),
			lines:     bytes.Count(text, []byte("\n")),
			ast:       parsed,
			fset:      fset,
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func isModule(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "go.mod"))
	return err == nil
}
