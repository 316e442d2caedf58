// Package agentconf reads the agent's configuration file. The agent lives by it, and the command takes
// its defaults from it.
package agentconf

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// Settings is the configuration file.
type Settings struct {
	// Host is the host's name in the pool; the machine's host name where it is empty.
	Host string `yaml:"host"`
	// Server is unix:///PATH or HOST:PORT.
	Server string `yaml:"server"`
	// Insecure allows plain text to a server that is neither on loopback nor on a unix socket.
	Insecure bool `yaml:"insecure"`
	// StateDir is the agent's disk.
	StateDir string `yaml:"state_dir"`
	// HookSocket and AgentSocket are paths. The installed hook looks at its built-in path only.
	HookSocket  string `yaml:"hook_socket"`
	AgentSocket string `yaml:"agent_socket"`
	// SweepInterval is the pause between two sweeps of /proc.
	SweepInterval time.Duration `yaml:"sweep_interval"`
}

// Defaults is what holds without a file.
func Defaults() Settings {
	return Settings{
		Server: "unix:///run/nsalloc/server.sock", StateDir: "/var/lib/nsalloc/agent",
		HookSocket: criuhook.SocketPath, AgentSocket: "/run/nsalloc/agent.sock", SweepInterval: time.Second,
	}
}

// Keys are the file's, in the order of Settings.
func Keys() (keys []string) {
	t := reflect.TypeFor[Settings]()
	for i := range t.NumField() {
		keys = append(keys, t.Field(i).Tag.Get("yaml"))
	}
	return keys
}

// Load reads the file over the defaults. A key that is not known is an error, and so is a second document:
// nobody would read it. With an error come the defaults alone.
func Load(path string) (Settings, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return Defaults(), fmt.Errorf("configuration: %w", err)
	}
	return parse(path, b)
}

// parse is Load of a file's text; path is for messages.
func parse(path string, b []byte) (Settings, error) {
	s := Defaults()
	d := yaml.NewDecoder(bytes.NewReader(b))
	d.KnownFields(true)
	if err := d.Decode(&s); err != nil && !errors.Is(err, io.EOF) {
		return Defaults(), fmt.Errorf("configuration %s: %w; the keys are %s", path, plain(err), strings.Join(Keys(), ", "))
	}
	var more yaml.Node
	if err := d.Decode(&more); err == nil {
		return Defaults(), fmt.Errorf("configuration %s: line %d: a second document begins; put all keys into one, without ---", path, more.Line)
	} else if !errors.Is(err, io.EOF) {
		return Defaults(), fmt.Errorf("configuration %s: %w", path, plain(err))
	}
	return s, nil
}

// clearer says of the decoder's complaints what they mean in this file.
var clearer = []struct {
	complaint *regexp.Regexp
	meaning   string
}{
	{regexp.MustCompile(`field (\S+) not found in type [\w.]+`), "there is no key $1"},
	{regexp.MustCompile(`cannot unmarshal !!\S+ (.+) into time\.Duration`), "$1 is no duration: write a number with its unit, such as 1s"},
	{regexp.MustCompile(`cannot unmarshal !!\S+ (.+) into bool`), "$1 is neither true nor false"},
	{regexp.MustCompile(`cannot unmarshal !!\S+ (.+) into \S+Settings`), "$1 is no key with a value"},
}

// plain says it in terms of the file and on one line, also where the file's own text is quoted.
func plain(err error) error {
	text := err.Error()
	if e, ok := errors.AsType[*yaml.TypeError](err); ok {
		text = strings.Join(e.Errors, ", ")
	}
	text = strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return ' '
		}
		return r
	}, text)
	for _, c := range clearer {
		text = c.complaint.ReplaceAllString(text, c.meaning)
	}
	return errors.New(text)
}
