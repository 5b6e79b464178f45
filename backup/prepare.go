package backup

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"

	"qmchain/chain"
)

// look looks at the guest, running or not.
func (s *session) look(ctx context.Context) (*view, error) {
	if s.daemon == nil {
		return look(ctx, s.qmp)
	}
	v, err := lookBlock(ctx, s.qmp)
	if err != nil {
		return nil, err
	}
	if v.snapshots, err = lookSnapshots(ctx, s.qmp); err != nil {
		return nil, err
	}
	v.status, v.images = "stopped", s.cfg.Offline
	if v.guest = s.cfg.Identity; v.guest != (chain.GuestIdentity{}) {
		return v, nil
	}
	if latest := s.points.Latest(); latest != nil {
		v.guest = latest.Guest // images don't tell whose they are
	}
	return v, nil
}

// Preview returns the plan of a run without changing anything. It refuses while the guest still has something of a run that
// was killed, as only recovering from that would show what the next run does.
func Preview(ctx context.Context, cfg Config) (*Plan, error) {
	s := &session{cfg: cfg, log: cfg.Log}
	client, err := s.connect(ctx)
	if err != nil {
		return nil, ofGuest(cfg.Guest, err)
	}
	defer client.Close()
	v, err := look(ctx, client)
	if err != nil {
		return nil, ofGuest(cfg.Guest, err)
	}
	if s.repo, err = cfg.Repo(); err != nil {
		return nil, err
	}
	if s.guest, err = s.repo.Guest(cfg.Guest); err != nil {
		return nil, err
	}
	if err := s.readPoints(); err != nil {
		return nil, err
	}
	plan, err := s.makePlan(v)
	if err != nil {
		return nil, ofGuest(cfg.Guest, err)
	}
	return plan, nil
}

func (s *session) makePlan(v *view) (*Plan, error) {
	disks, err := v.disks()
	if err != nil {
		return nil, err
	}
	damaged, err := s.guest.Damaged(s.points)
	if err != nil {
		s.log.Warnf("what verify has found is not known, and so an increment may be made on what is damaged: %v", err)
	}
	random := make([]byte, 2)
	_, _ = rand.Read(random) // never fails
	p := planner{
		repo:    s.repo.ShortID(),
		points:  s.points,
		guest:   v.guest,
		memory:  v.images == nil,
		refused: s.cfg.Kept.refusals(s.cfg.Guest),
		now:     s.cfg.Now(),
		sound: func(l chain.Layer) error {
			if found, ok := damaged[l.Point.Ref(l.Disk.Name)]; ok {
				return found.Err()
			}
			return s.guest.CheckImages(s.points, l.Point, l.Disk.Name)
		},
	}
	return p.plan(chain.NewID(s.cfg.Now(), s.tip, binary.BigEndian.Uint16(random)), disks, s.cfg.Request)
}

func (s *session) report() {
	for _, d := range s.plan.Left {
		if d.unsupported {
			s.warnf("disk %s is left out: %s", d.Name, d.Left)
			continue
		}
		s.log.Infof("disk %s is left out: %s", d.Name, d.Left)
	}
	for _, d := range s.plan.Disks {
		switch {
		case d.Unplanned:
			s.warnf("disk %s: a full instead of an increment: %s", d.Name, d.Reason)
		case d.Level.Overlay():
			s.log.Infof("disk %s: %s since %s", d.Name, d.Level, d.Parent.Point.ID)
		default:
			s.log.Infof("disk %s: %s: %s", d.Name, d.Level, d.Reason)
		}
		for _, b := range d.Stray {
			s.log.Warnf("disk %s: bitmap %s belongs to no point of the repository; it is left alone", d.Name, b)
		}
	}
}

// checkUnmoved makes sure that no other QEMU process writes to the guest's disks: one that the guest was or is being migrated to.
func (s *session) checkUnmoved(ctx context.Context) error {
	if s.daemon != nil {
		return nil
	}
	status, err := s.qmp.QueryStatus(ctx)
	if err != nil {
		return err
	}
	switch status.Status {
	case "inmigrate", "finish-migrate", "postmigrate", "colo":
		return fmt.Errorf("the guest is being migrated (it is in the state %s): %w", status.Status, ErrBusy)
	}
	var migration struct {
		Status string `json:"status"`
	}
	if err := s.qmp.Execute(ctx, "query-migrate", nil, &migration); err != nil {
		return err
	}
	switch migration.Status {
	case "", "none", "completed", "failed", "cancelled":
		return nil
	}
	return fmt.Errorf("the guest is being migrated (%s): %w", migration.Status, ErrBusy)
}

// checkSupport refuses what this QEMU can't do without danger to the guest.
func (s *session) checkSupport(ctx context.Context, v *view) error {
	if s.cfg.Fleecing.Off || v.version.AtLeast(9, 0) {
		return nil
	}
	// QEMU 7.2 aborts, and the guest with it, when a filter goes onto a disk that an iothread serves; 9.0 is the first
	// without the lock that is behind it.
	for _, d := range s.plan.Disks {
		served, err := servedByIOThread(ctx, s.qmp, d.device)
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.Name, err)
		}
		if served {
			return fmt.Errorf("disk %s: QEMU %s: %w", d.Name, v.version, ErrIOThread)
		}
	}
	return nil
}
