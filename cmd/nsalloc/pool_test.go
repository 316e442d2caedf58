package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/internal/etcdembed"
)

// TestPoolInit is against a real etcd: what makes a pool must not make a second one.
func TestPoolInit(t *testing.T) {
	etcd, err := etcdembed.Start(t.Context(), etcdembed.Config{Dir: shortDir(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer etcd.Close()
	initPool := func(args ...string) (int, string, string) {
		var out, errs bytes.Buffer
		c := &cli{in: strings.NewReader(""), out: &out, err: &errs, now: time.Now, getenv: func(string) string { return "" }}
		code := c.run(t.Context(), append([]string{"pool", "init", "--timeout", "30s", "--etcd", etcd.Endpoint()}, args...))
		return code, out.String(), errs.String()
	}
	code, out, errs := initPool("-o", "json", "--policy-live", "refuse")
	var doc poolDoc
	if err := json.Unmarshal([]byte(out), &doc); code != exitOK || err != nil {
		t.Fatalf("exit code %d, %v: %s%s", code, err, out, errs)
	}
	if doc.UUID == "" || doc.Generation != 1 || doc.State != "open" || doc.Policy.Live != "refuse" {
		t.Errorf("%+v", doc)
	}
	code, _, errs = initPool()
	if code != exitConflict || !strings.Contains(errs, doc.UUID) {
		t.Errorf("a second time: exit code %d: %s", code, errs)
	}
	if code, out, errs = initPool("--pool", "another"); code != exitOK {
		t.Errorf("another pool in the same etcd: exit code %d: %s%s", code, out, errs)
	}
	if code, _, errs = initPool("--pool", "No Name"); code != exitUsage {
		t.Errorf("a bad name: exit code %d: %s", code, errs)
	}
}

func TestPoolInitWithoutEtcd(t *testing.T) {
	code, _, errs := invoke(t, &fake{}, "pool", "init", "--etcd", "http://127.0.0.1:1", "--timeout", "1s")
	if code != exitUnavailable || strings.Contains(errs, "\n\n") {
		t.Errorf("exit code %d: %s", code, errs)
	}
	t.Log(errs)
}
