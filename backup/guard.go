package backup

import (
	"context"
	"fmt"
	"time"

	"qmchain/chain"
	"qmchain/qmp"
)

// Guard is what manages a guest on its host, such as Proxmox VE, as far as a backup has to do with it. A guest of plain QEMU
// has none.
type Guard interface {
	// Check makes sure that it is the guest who answers. It is called for each connection, before anything else is done there.
	Check(Peer) error
	// Take keeps others from changing, moving, ending or starting the guest until release is called, which is done in any case.
	// It is called once, before anything is changed, and for a stopped guest before its images are opened.
	Take(ctx context.Context) (release func(context.Context) error, err error)
	// Files are what the guest can be made from again. What is missing of it is worth a warning. It is called while the guest is
	// taken.
	Files(ctx context.Context) (files []File, warnings []string, err error)
}

// Peer is who answers on a QMP socket.
type Peer struct {
	PID   int // of the process that listens; 0: not known
	Guest chain.GuestIdentity
}

// File is a file that goes into the point beside its disks.
type File struct {
	Name string
	Data []byte
}

// releaseLimit bounds the giving back of a guest.
const releaseLimit = time.Minute

// connect connects to the guest, and makes sure that it is the guest.
func connect(ctx context.Context, addr string, guard Guard) (*qmp.Client, error) {
	client, err := qmp.Dial(ctx, addr)
	if err != nil || guard == nil {
		return client, err
	}
	id, err := lookIdentity(ctx, client)
	if err == nil {
		err = guard.Check(Peer{client.PeerPID(), id})
	}
	if err != nil {
		_ = client.Close()
		return nil, err
	}
	return client, nil
}

// connect connects to the guest, or to the daemon that has a stopped guest's images open.
func (s *session) connect(ctx context.Context) (*qmp.Client, error) {
	if s.daemon != nil {
		return connect(ctx, s.cfg.Addr, nil)
	}
	return connect(ctx, s.cfg.Addr, s.cfg.Guard)
}

// take takes the guest; release can be called in any case.
func (s *session) take(ctx context.Context) (release func(), err error) {
	if s.cfg.Guard == nil {
		return func() {}, nil
	}
	giveBack, err := s.cfg.Guard.Take(ctx)
	if err != nil {
		return func() {}, err
	}
	return func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseLimit)
		defer cancel()
		if err := giveBack(ctx); err != nil {
			s.warnf("the guest is not given back: %v", err)
		}
	}, nil
}

// addFiles puts into the point what the guest can be made from again.
func (s *session) addFiles(ctx context.Context) error {
	if s.cfg.Guard == nil {
		return nil
	}
	files, warnings, err := s.cfg.Guard.Files(ctx)
	for _, text := range warnings {
		s.warnf("%s", text)
	}
	for _, f := range files {
		if err == nil {
			err = s.partial.WriteGuestFile(f.Name, f.Data)
		}
	}
	if err != nil {
		return fmt.Errorf("what the guest is made from: %w", err)
	}
	return nil
}
