package agentconf

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
)

func TestLoad(t *testing.T) {
	changed := Defaults()
	changed.Host, changed.Server, changed.Insecure, changed.SweepInterval = "a", "pool:7070", true, 5*time.Second
	for name, test := range map[string]struct {
		text  string
		want  Settings
		error string
	}{
		"nothing":       {"", Defaults(), ""},
		"comments only": {"# later\n", Defaults(), ""},
		"some":          {"host: a\nserver: pool:7070\ninsecure: true\nsweep_interval: 5s\n", changed, ""},
		"unknown keys":  {"host: a\nsever: pool:7070\n", Defaults(), "line 2: there is no key sever; the keys are host, server, insecure, state_dir, hook_socket, agent_socket, sweep_interval"},
		"two mistakes":  {"sever: x\ninsecure: 7\n", Defaults(), "line 1: there is no key sever, line 2: `7` is neither"},
		"a wrong type":  {"host: a\ninsecure: perhaps\n", Defaults(), "line 2: `perhaps` is neither true nor false"},
		"no unit":       {"sweep_interval: 5\n", Defaults(), "line 1: `5` is no duration: write a number with its unit, such as 1s"},
		"no duration":   {"host: a\nsweep_interval: soon\n", Defaults(), "line 2: `soon` is no duration"},
		"no keys":       {"host\n", Defaults(), "line 1: `host` is no key with a value"},
		"two documents": {"host: a\n---\nserver: pool:7070\n", Defaults(), "line 2: a second document"},
		"no YAML":       {"host: [\n", Defaults(), "did not find"},
	} {
		path := filepath.Join(t.TempDir(), "agent.yaml")
		if err := os.WriteFile(path, []byte(test.text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := Load(path)
		if got != test.want {
			t.Errorf("%s: %+v", name, got)
		}
		if (err == nil) != (test.error == "") || err != nil && (!strings.Contains(err.Error(), test.error) || strings.Contains(err.Error(), "\n")) {
			t.Errorf("%s: error %v", name, err)
		}
	}
	if got, err := Load("/nowhere/agent.yaml"); got != Defaults() || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %+v, %v", got, err)
	}
}

// FuzzLoad: a text is a configuration or an error of one line, never a bit of each; and what was understood
// is what a person would write down to say the same.
func FuzzLoad(f *testing.F) {
	for _, text := range []string{
		"", "# later\n", "host: a\nserver: pool:7070\ninsecure: true\nsweep_interval: 5s\n", "sever: x\ninsecure: 7\n", "host: [\n", "host: a\n---\nserver: b\n",
		"host: &x a\nserver: *x\n", "{host: a, host: b}", "<<: {host: a}", "host: !!binary YQ==\n", "\ufeffhost: a\n", "host: |\n  a\n  b\n",
		"a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]\n",
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := parse("agent.yaml", text)
		if err != nil {
			if s != Defaults() || strings.Contains(err.Error(), "\n") || len(err.Error()) > 400+8*len(text) {
				t.Errorf("%+v with the error %q", s, err)
			}
			return
		}
		b, err := yaml.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := parse("agent.yaml", b); err != nil || again != s {
			t.Errorf("%+v, written as\n%s\nbecame %+v, %v", s, b, again, err)
		}
	})
}
