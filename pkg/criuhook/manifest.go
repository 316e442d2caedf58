package criuhook

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

const (
	// ManifestFormat is the format that this version writes and reads.
	ManifestFormat = 1
	// MaxManifest is the size of the largest manifest, in bytes: some 300 for each of alloc.MaxBindings
	// namespaces.
	MaxManifest = 2 << 20
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
	// under another dump's images is noticed. The other images (memory, registers, files, mounts) are
	// covered by nothing here: who can write them decides what CRIU restores, with root's rights.
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

// DecodeManifest reads a manifest of at most MaxManifest bytes and checks it. Nothing but the bytes that
// Encode writes is a manifest: not another order, spacing or spelling of a field, no unknown field, none
// that stands twice, nothing that follows. So two readers of one file never understand two things.
func DecodeManifest(r io.Reader) (*Manifest, alloc.Digest, error) {
	b, err := io.ReadAll(io.LimitReader(r, MaxManifest+1))
	if err != nil {
		return nil, alloc.Digest{}, fmt.Errorf("manifest: %w", err)
	}
	if len(b) > MaxManifest {
		return nil, alloc.Digest{}, fmt.Errorf("manifest: larger than %d bytes: not one of ours", MaxManifest)
	}
	// The format is read first: another one's fields may be of other types.
	var probe struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(b, &probe); err != nil {
		return nil, alloc.Digest{}, fmt.Errorf("manifest: not the JSON of a manifest: %w", brief(err))
	}
	if probe.Format != ManifestFormat {
		return nil, alloc.Digest{}, formatError(probe.Format)
	}
	var m Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, alloc.Digest{}, fmt.Errorf("manifest: %w", brief(err))
	}
	// encoding/json takes names whatever their case, lets the last of two win and repairs broken UTF-8.
	// What comes out written back tells.
	again, digest, err := m.Encode()
	if err != nil {
		return nil, alloc.Digest{}, err
	}
	if !bytes.Equal(again, b) {
		return nil, alloc.Digest{}, fmt.Errorf("manifest: not in the form in which nsalloc writes it: it was edited, or damaged; copy the images again from where they were dumped")
	}
	return &m, digest, nil
}

func formatError(format int) error {
	return fmt.Errorf("manifest: format %d, this version reads %d; restore with the release that dumped, or a newer one", format, ManifestFormat)
}

func (m *Manifest) validate() error {
	switch {
	case m.Format != ManifestFormat:
		return formatError(m.Format)
	case !word(m.Pool) || !word(m.Source) || m.RunID != "" && !word(m.RunID):
		return fmt.Errorf("manifest: pool %.64q, source %.64q or run id %.64q is missing, too long or no name", m.Pool, m.Source, m.RunID)
	case !m.Checkpoint.Valid() || !m.Sandbox.Valid() || m.Checkpoint == m.Sandbox || m.Epoch == 0:
		return fmt.Errorf("manifest: checkpoint %s, sandbox %s or epoch %s is out of range", m.Checkpoint, m.Sandbox, m.Epoch)
	case len(m.Namespaces) == 0 || len(m.Namespaces) > alloc.MaxBindings:
		return fmt.Errorf("manifest: %d namespaces, 1 to %d are allowed", len(m.Namespaces), alloc.MaxBindings)
	case m.Images == alloc.Digest{}:
		return fmt.Errorf("manifest: it has no digest of the images")
	}
	type id struct {
		t alloc.NamespaceType
		c uint32
	}
	ids, serials, kernel := map[id]bool{}, map[alloc.Serial]bool{m.Checkpoint: true, m.Sandbox: true}, map[string]bool{}
	for _, n := range m.Namespaces {
		key, live := id{n.Type, n.CRIUID}, n.Kernel.Key(n.Type)
		switch {
		case !n.Type.Valid() || !n.Serial.Valid() || n.CRIUID == 0:
			return fmt.Errorf("manifest: namespace %.16q/%s/%d is out of range", string(n.Type), n.Serial, n.CRIUID)
		case !word(n.Kernel.BootID) || n.Kernel.ID == 0 && n.Kernel.Inode == 0:
			return fmt.Errorf("manifest: namespace %s has no kernel identity", n.Serial)
		case n.Owner != OwnerSandbox && n.Owner != OwnerHost && n.Owner != OwnerExternal:
			return fmt.Errorf("manifest: namespace %s has the owner %.32q", n.Serial, string(n.Owner))
		case ids[key] || serials[n.Serial] || kernel[live]:
			return fmt.Errorf("manifest: namespace %s (%s %d) stands twice, or its serial or kernel identity does", n.Serial, n.Type, n.CRIUID)
		}
		ids[key], serials[n.Serial], kernel[live] = true, true, true
	}
	return nil
}

// word reports whether s is a name, UUID or the like: 1 to 64 letters, digits, '.', '-' and '_', so that
// it can stand in a log, a path or a record as it is.
func word(s string) bool {
	return s != "" && len(s) <= 64 && strings.IndexFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '.' && r != '-' && r != '_'
	}) < 0
}
