package criuhook

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

const (
	// ManifestFormat is the format that this version writes and reads.
	ManifestFormat = 1
	// MaxManifest is the size of the largest manifest, in bytes.
	MaxManifest = 1 << 20
)

// Manifest travels in the image directory and says who the images are. It is a claim ticket and no
// more: state and serials come from the store, which holds the SHA-256 of the manifest's exact bytes.
type Manifest struct {
	Format     int          `json:"format"`
	Pool       string       `json:"pool"`
	Checkpoint alloc.Serial `json:"checkpoint"`
	Sandbox    alloc.Serial `json:"sandbox"`
	Epoch      alloc.Epoch  `json:"epoch"`
	// RunID is CRIU's dump_criu_run_id; empty from CRIU before 4.1.
	RunID string `json:"run_id,omitempty"`
	// Source is the host that dumped.
	Source string `json:"source"`
	// Namespaces has one entry a namespace of the tree.
	Namespaces []ManifestNamespace `json:"namespaces"`
	// Images is the SHA-256 over the inventory, pstree and ids images, so that a genuine manifest
	// under another dump's images is noticed.
	Images alloc.Digest `json:"images"`
}

// ManifestNamespace is one namespace of the dumped tree.
type ManifestNamespace struct {
	Type   alloc.NamespaceType `json:"type"`
	Serial alloc.Serial        `json:"serial"`
	// CRIUID is the namespace's id in these images: a counter of that dump, over all types.
	CRIUID uint32 `json:"criu_id"`
	// Kernel is what the namespace was on the source.
	Kernel alloc.KernelID `json:"kernel"`
	// Owner says whose serial it is.
	Owner NamespaceOwner `json:"owner"`
}

// NamespaceOwner says whether a namespace moves with its tree.
type NamespaceOwner string

// The owners.
const (
	// OwnerSandbox: its serial moves.
	OwnerSandbox NamespaceOwner = "sandbox"
	// OwnerHost: it is the host's, shared by the tree; the target's own takes its place.
	OwnerHost NamespaceOwner = "host"
	// OwnerExternal: it belongs to another sandbox, or is handed in by the caller; it stays.
	OwnerExternal NamespaceOwner = "external"
)

// Encode checks the manifest and writes its one form. The digest is of exactly these bytes.
func (m *Manifest) Encode() ([]byte, alloc.Digest, error) {
	if err := m.validate(); err != nil {
		return nil, alloc.Digest{}, err
	}
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, alloc.Digest{}, fmt.Errorf("manifest: %w", err)
	}
	b = append(b, '\n')
	if len(b) > MaxManifest {
		return nil, alloc.Digest{}, fmt.Errorf("manifest: %d bytes for %d namespaces, %d are allowed", len(b), len(m.Namespaces), MaxManifest)
	}
	return b, sha256.Sum256(b), nil
}

// DecodeManifest reads a manifest of at most MaxManifest bytes and checks it. Unknown fields, a second
// value and every number out of range are refused: nothing but what Encode writes is a manifest.
func DecodeManifest(r io.Reader) (*Manifest, alloc.Digest, error) {
	b, err := io.ReadAll(io.LimitReader(r, MaxManifest+1))
	if err != nil {
		return nil, alloc.Digest{}, fmt.Errorf("manifest: %w", err)
	}
	if len(b) > MaxManifest {
		return nil, alloc.Digest{}, fmt.Errorf("manifest: larger than %d bytes: not one of ours", MaxManifest)
	}
	var probe struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(b, &probe); err != nil {
		return nil, alloc.Digest{}, fmt.Errorf("manifest: not the JSON of a manifest: %w", err)
	}
	if probe.Format != ManifestFormat {
		return nil, alloc.Digest{}, fmt.Errorf("manifest: format %d, this version reads %d; restore with the release that dumped, or a newer one", probe.Format, ManifestFormat)
	}
	var m Manifest
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&m); err != nil {
		return nil, alloc.Digest{}, fmt.Errorf("manifest: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, alloc.Digest{}, fmt.Errorf("manifest: something follows the manifest in its file")
	}
	if err := m.validate(); err != nil {
		return nil, alloc.Digest{}, err
	}
	return &m, sha256.Sum256(b), nil
}

func (m *Manifest) validate() error {
	switch {
	case m.Format != ManifestFormat:
		return fmt.Errorf("manifest: format %d is not %d", m.Format, ManifestFormat)
	case m.Pool == "" || m.Source == "" || len(m.Pool) > 64 || len(m.Source) > 64 || len(m.RunID) > 64:
		return fmt.Errorf("manifest: pool, source or run id is missing or too long")
	case !m.Checkpoint.Valid() || !m.Sandbox.Valid() || m.Epoch == 0:
		return fmt.Errorf("manifest: checkpoint %s, sandbox %s or epoch %s is out of range", m.Checkpoint, m.Sandbox, m.Epoch)
	case len(m.Namespaces) == 0 || len(m.Namespaces) > alloc.MaxBindings:
		return fmt.Errorf("manifest: %d namespaces, 1 to %d are allowed", len(m.Namespaces), alloc.MaxBindings)
	}
	type id struct {
		t alloc.NamespaceType
		c uint32
	}
	ids, serials := map[id]bool{}, map[alloc.Serial]bool{}
	for _, n := range m.Namespaces {
		key := id{n.Type, n.CRIUID}
		switch {
		case !n.Type.Valid() || !n.Serial.Valid() || n.CRIUID == 0:
			return fmt.Errorf("manifest: namespace %s/%s/%d is out of range", n.Type, n.Serial, n.CRIUID)
		case n.Owner != OwnerSandbox && n.Owner != OwnerHost && n.Owner != OwnerExternal:
			return fmt.Errorf("manifest: namespace %s has the owner %.32q", n.Serial, n.Owner)
		case ids[key] || serials[n.Serial]:
			return fmt.Errorf("manifest: namespace %s (%s %d) stands twice", n.Serial, n.Type, n.CRIUID)
		}
		ids[key], serials[n.Serial] = true, true
	}
	return nil
}
