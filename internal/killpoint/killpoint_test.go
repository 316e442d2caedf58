package killpoint

import (
	"bytes"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

const root = "../.."

// TestEveryPointIsUsed: what is declared is registered, and stands in the code once or more.
func TestEveryPointIsUsed(t *testing.T) {
	used := map[string]bool{}
	for _, dir := range []string{"cmd", "internal", "pkg"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, _ fs.DirEntry, err error) error {
			if err != nil || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
				return err
			}
			ast.Inspect(parse(t, path), func(n ast.Node) bool {
				if sel, ok := n.(*ast.SelectorExpr); ok {
					if pkg, ok := sel.X.(*ast.Ident); ok && pkg.Name == "killpoint" {
						used[sel.Sel.Name] = true
					}
				}
				return true
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	declared := map[string]bool{}
	for _, d := range parse(t, "killpoint.go").Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok || g.Tok != token.CONST {
			continue
		}
		for _, spec := range g.Specs {
			v := spec.(*ast.ValueSpec)
			if typ, ok := v.Type.(*ast.Ident); !ok || typ.Name != "Point" {
				continue
			}
			name, point := v.Names[0].Name, Point(strings.Trim(v.Values[0].(*ast.BasicLit).Value, `"`))
			declared[name] = true
			at := slices.IndexFunc(registered, func(r struct {
				family Point
				of     []string
			}) bool {
				return r.family == point
			})
			switch {
			case at < 0:
				t.Errorf("%s is not registered: no test knows of it", name)
			case (registered[at].of != nil) != strings.Contains(string(point), "*"):
				t.Errorf("%s (%s): a family, and only a family, has members", name, point)
			case !used[name]:
				t.Errorf("%s is registered and stands nowhere in the code", name)
			}
		}
	}
	if len(declared) != len(registered) {
		t.Errorf("%d points are declared, %d registered", len(declared), len(registered))
	}
	all := All()
	if sorted := slices.Compact(slices.Sorted(slices.Values(all))); len(sorted) != len(all) {
		t.Errorf("All lists a point twice: %q", all)
	}
}

func parse(t *testing.T, path string) *ast.File {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func build(t *testing.T, out string, args ...string) {
	t.Helper()
	cmd := exec.Command("go", append([]string{"build", "-trimpath", "-o", out}, args...)...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, text)
	}
}

// TestReleaseHasNone: a binary without the tag holds no point, not even a name; one with it does.
func TestReleaseHasNone(t *testing.T) {
	if testing.Short() {
		t.Skip("builds binaries")
	}
	dir := t.TempDir()
	holds := func(name string) bool {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Contains(b, []byte("killpoint")) || bytes.Contains(b, []byte(Env))
	}
	for _, name := range []string{"nsalloc-hook", "nsalloc-agent", "nsalloc-server"} {
		build(t, filepath.Join(dir, name), "./cmd/"+name)
		if holds(name) {
			t.Errorf("%s holds kill points", name)
		}
	}
	build(t, filepath.Join(dir, "tagged"), "-tags", "killpoints", "./cmd/nsalloc-hook")
	if !holds("tagged") {
		t.Error("what is looked for is not in a binary with points either: the test shows nothing")
	}
}

// TestStrikesOnce: an armed point ends the process by SIGKILL, and the next process goes past it.
func TestStrikesOnce(t *testing.T) {
	if testing.Short() {
		t.Skip("builds a binary")
	}
	dir := t.TempDir()
	hook, conf := filepath.Join(dir, "hook"), filepath.Join(dir, "agent.yaml")
	build(t, hook, "-tags", "killpoints", "-ldflags", "-X main.configPath="+conf+" -X main.socketPath="+filepath.Join(dir, "none"), "./cmd/nsalloc-hook")
	if err := os.WriteFile(conf, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	point := filepath.Join(dir, "points", "hook", "pre-dump", "answered")
	if err := os.MkdirAll(filepath.Dir(point), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(point, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	run := func() syscall.WaitStatus {
		cmd := exec.Command(hook)
		cmd.Env = []string{"CRTOOLS_SCRIPT_ACTION=pre-dump", Env + "=" + filepath.Join(dir, "points")}
		var exit *exec.ExitError
		if err := cmd.Run(); !errors.As(err, &exit) {
			t.Fatalf("the hook: %v; without an agent it vetoes", err)
		}
		return exit.Sys().(syscall.WaitStatus)
	}
	if s := run(); !s.Signaled() || s.Signal() != syscall.SIGKILL {
		t.Errorf("at an armed point it ended with %v", s)
	}
	if _, err := os.Stat(point + ".hit"); err != nil {
		t.Errorf("nothing shows that it was hit: %v", err)
	}
	if s := run(); s.Signaled() || s.ExitStatus() != 1 {
		t.Errorf("the point struck again: %v", s)
	}
}
