//go:build linux

package notify_test

import (
	"log"
	"os"

	criu "github.com/checkpoint-restore/go-criu/v7"
	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"google.golang.org/protobuf/proto"

	"github.com/nsalloc/nsalloc/pkg/criuhook/notify"
)

// mine is what the program does by itself at some of the points; NoNotify fills in the others.
type mine struct{ criu.NoNotify }

func (mine) PostDump() error {
	log.Print("everything is written")
	return nil
}

// Dump the tree below a process with go-criu, so that it keeps its serials wherever it is restored.
func Example() {
	images, err := os.Open("/var/lib/checkpoints/web")
	if err != nil {
		log.Fatal(err)
	}
	defer images.Close()
	const pid = 4711

	n, err := notify.New(notify.Config{
		Images: images,
		PID:    pid,
		Notify: mine{},
		Log:    func(message string) { log.Print(message) },
	})
	if err != nil {
		log.Fatal(err)
	}
	defer n.Close()

	opts := &rpc.CriuOpts{
		ImagesDirFd: proto.Int32(int32(images.Fd())),
		Pid:         proto.Int32(pid),
		LogFile:     proto.String("dump.log"),
	}
	if err := criu.MakeCriu().Dump(opts, n); err != nil {
		log.Fatal(err) // a veto says why
	}
}
