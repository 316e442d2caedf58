package server

import (
	"testing"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

func pagesOf(t *testing.T, m *machine, size int32) (serials []string) {
	t.Helper()
	req := &nsallocv1.SandboxesListRequest{PageSize: size, Linearizable: true}
	for {
		resp, err := nsallocv1.NewSandboxesClient(m.Conn()).List(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		if len(resp.GetSandboxes()) > int(size) {
			t.Fatalf("%d on a page of %d", len(resp.GetSandboxes()), size)
		}
		for _, s := range resp.GetSandboxes() {
			serials = append(serials, alloc.Serial(s.GetSerial()).String())
		}
		if req.PageToken = resp.GetNextPageToken(); req.PageToken == "" {
			return serials
		}
	}
}

func hostPages(t *testing.T, m *machine, size int32) (n int) {
	t.Helper()
	req := &nsallocv1.HostsListRequest{PageSize: size}
	for {
		resp, err := nsallocv1.NewHostsClient(m.Conn()).List(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		n += len(resp.GetHosts())
		if req.PageToken = resp.GetNextPageToken(); req.PageToken == "" {
			return n
		}
	}
}
