package agent

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	criu_core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/netdev"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pidns"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pstree"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// writeImages makes the images of a dump of one task, vpid 1, whose namespaces of the types in own are
// not the host's.
func writeImages(t *testing.T, runID string, own ...alloc.NamespaceType) string {
	t.Helper()
	dir := t.TempDir()
	host, tree := ids(nil), ids(own)
	inv, err := proto.Marshal(&inventory.InventoryEntry{ImgVersion: proto.Uint32(2), RootIds: host})
	if err != nil {
		t.Fatal(err)
	}
	if runID != "" { // field 13, which go-criu does not know
		inv = protowire.AppendString(protowire.AppendTag(inv, 13, protowire.BytesType), runID)
	}
	task, err := proto.Marshal(&pstree.PstreeEntry{Pid: proto.Uint32(1), Ppid: proto.Uint32(0), Pgid: proto.Uint32(1), Sid: proto.Uint32(1), Threads: []uint32{1}})
	if err != nil {
		t.Fatal(err)
	}
	kobj, err := proto.Marshal(tree)
	if err != nil {
		t.Fatal(err)
	}
	const common = 0x54564319
	writeImage(t, filepath.Join(dir, "inventory.img"), inv, 0x58313116)
	writeImage(t, filepath.Join(dir, "pstree.img"), task, common, 0x50273030)
	writeImage(t, filepath.Join(dir, "ids-1.img"), kobj, common, 0x54432030)
	return dir
}

// external makes namespaces of the tree ones that CRIU was told to join, not to restore.
func external(t *testing.T, dir string, types ...alloc.NamespaceType) string {
	t.Helper()
	for _, typ := range types {
		var m proto.Message = &netdev.NetnsEntry{ExtKey: proto.String("extRootNetNS")}
		own, magic := ids(types).GetNetNsId(), uint32(0x55933752)
		if typ == alloc.PID {
			m = &pidns.PidnsEntry{ExtKey: proto.String("extRootPidNS")}
			own, magic = ids(types).GetPidNsId(), 0x61157326
		}
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		writeImage(t, filepath.Join(dir, fmt.Sprintf("%sns-%d.img", typ, own)), b, 0x54564319, magic)
	}
	return dir
}

// ids numbers namespaces as CRIU does: those in own differ from the host's.
func ids(own []alloc.NamespaceType) *criu_core.TaskKobjIdsEntry {
	n := map[alloc.NamespaceType]*uint32{}
	for i, t := range alloc.NamespaceTypes() {
		n[t] = proto.Uint32(uint32(i + 1))
	}
	for _, t := range own {
		n[t] = proto.Uint32(*n[t] + 10)
	}
	return &criu_core.TaskKobjIdsEntry{
		VmId: proto.Uint32(1), FilesId: proto.Uint32(1), FsId: proto.Uint32(1), SighandId: proto.Uint32(1),
		MntNsId: n[alloc.Mnt], UtsNsId: n[alloc.UTS], IpcNsId: n[alloc.IPC], PidNsId: n[alloc.PID],
		NetNsId: n[alloc.Net], CgroupNsId: n[alloc.Cgroup], UserNsId: n[alloc.User], TimeNsId: n[alloc.Time],
	}
}

func writeImage(t *testing.T, path string, message []byte, magic ...uint32) {
	t.Helper()
	var b []byte
	for _, m := range magic {
		b = binary.LittleEndian.AppendUint32(b, m)
	}
	b = append(binary.LittleEndian.AppendUint32(b, uint32(len(message))), message...)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
