package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestListFits: every mutation finds its text, once, gives Go, and names a test that is there. That the
// tests catch them is what `make mutants` shows.
func TestListFits(t *testing.T) {
	t.Chdir("../..")
	tests := map[string]map[string]bool{}
	seen := map[string]bool{}
	for _, m := range mutations {
		if seen[m.what] {
			t.Errorf("%s: it stands twice in the list", m.what)
		}
		seen[m.what] = true
		text, err := m.mutated()
		if err != nil {
			t.Errorf("%s: %v", m.what, err)
			continue
		}
		if _, err := parser.ParseFile(token.NewFileSet(), m.file, text, 0); err != nil || m.old == m.new {
			t.Errorf("%s: it does not give another Go file: %v", m.what, err)
		}
		if tests[m.pkg] == nil {
			if tests[m.pkg], err = testsOf(m.pkg); err != nil {
				t.Fatal(err)
			}
		}
		top, _, _ := strings.Cut(m.test, "/")
		if !tests[m.pkg][top] {
			t.Errorf("%s: there is no test %s in %s", m.what, top, m.pkg)
		}
	}
	for what := range panicking {
		if !seen[what] {
			t.Errorf("%s is to panic and stands nowhere in the list", what)
		}
	}
	if len(mutations) < 16 {
		t.Errorf("%d mutations are too few", len(mutations))
	}
}

func testsOf(pkg string) (map[string]bool, error) {
	files, err := filepath.Glob(filepath.Join(pkg, "*_test.go"))
	if err != nil {
		return nil, err
	}
	found := map[string]bool{}
	for _, name := range files {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && strings.HasPrefix(fn.Name.Name, "Test") {
				found[fn.Name.Name] = true
			}
		}
	}
	return found, nil
}

// TestSurvivor: a mutant that no test notices is told from one that is caught, from one that does not compile,
// and from one that panics, where that is not what it has to do.
func TestSurvivor(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	for name, text := range map[string]string{
		"go.mod":      "module m\n\ngo 1.26\n",
		"m/m.go":      "package m\n\nfunc Max(a, b int) int {\n\tif a > b {\n\t\treturn a\n\t}\n\treturn b\n}\n",
		"m/m_test.go": "package m\n\nimport \"testing\"\n\nfunc TestMax(t *testing.T) {\n\tif Max(2, 1) != 2 {\n\t\tt.Error(\"no\")\n\t}\n}\n",
	} {
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for i, c := range []struct{ old, new, panics, want string }{
		{"a > b", "a < b", "", ""},
		{"a > b", "a >= b", "", "NOT CAUGHT"},
		{"a > b", "a > c", "", "NOT TRIED"},
		{"a > b {", "for a > b {", "", "NOT TRIED"},
		{"return", "panic", "", "stale"},
		{"return a", `panic("no " + "more")`, "", "PANICKED"},
		{"return a", `panic("no " + "more")`, "no more", ""},
		{"return a", `panic("no " + "more")`, "no less", "PANICKED"},
		{"return a", "go func() { panic(a) }(); select {}", "", "PANICKED"},
		{"a > b", "a < b", "no more", "NO PANIC"},
		{"package m", "package m; import \"os\"; func init() { os.Exit(1) }", "", "NOT TRIED"},
	} {
		m := mutation{what: c.new, file: "m/m.go", old: c.old, new: c.new, pkg: "m", test: "TestMax"}
		if got := m.try(t.Context(), filepath.Join(dir, fmt.Sprint(i)), c.panics); !strings.HasPrefix(got, c.want) || (got == "") != (c.want == "") {
			t.Errorf("%s: %q, want %q", c.new, got, c.want)
		}
	}
}
