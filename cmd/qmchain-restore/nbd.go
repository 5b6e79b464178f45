package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"

	"qmchain/chain"
	"qmchain/chain/nbd"
	"qmchain/cmd/internal/points"
	"qmchain/internal/ui"
)

type nbdCmd struct {
	points.Flags `embed:""`
	Socket       string `conf:"no" required:"" placeholder:"ADDR" help:"Where to listen: unix:PATH or tcp:HOST:PORT. Who can connect can read the disks."`
	JSON         bool   `conf:"no" name:"json" help:"Print one JSON document."`
}

// serving is the output of nbd --json.
type serving struct {
	Guest   string       `json:"guest"`
	ID      chain.ID     `json:"id"`
	Exports []servedDisk `json:"exports"`
}

type servedDisk struct {
	Name string `json:"name"` // of the export, and of the disk
	URI  string `json:"uri"`
	Size int64  `json:"size"` // bytes
}

func (c *nbdCmd) Run(ctx context.Context, u *ui.UI) error {
	p, err := openPoint(c.Repo, c.Point)
	if err != nil {
		return err
	}
	defer p.Close()
	names, err := p.Choose(c.Disk)
	if err != nil {
		return err
	}
	disks, closeAll, err := p.OpenDisks(names)
	if err != nil {
		return err
	}
	defer closeAll()

	for _, d := range p.Doubts(names) {
		u.Log.Warn(d)
	}
	p.damage(u, names)
	l, err := nbd.Listen(ctx, absolute(c.Socket))
	if err != nil {
		return fmt.Errorf("--socket: %w", err)
	}
	if tcp, ok := l.Addr().(*net.TCPAddr); ok && !tcp.IP.IsLoopback() {
		u.Log.Warnf("everybody who can reach %s can read the disks", tcp)
	}
	server := nbd.Server{Problem: func(err error) { u.Log.Warn(err) }}
	out := serving{Guest: p.Guest.Name, ID: p.ID}
	for _, d := range disks {
		server.Exports = append(server.Exports, nbd.Export{Name: d.Name, Description: p.Name(), Image: d})
		out.Exports = append(out.Exports, servedDisk{d.Name, nbd.URI(l.Addr(), d.Name), d.Size()})
	}
	err = u.Result(c.JSON, out, func(w io.Writer) error {
		for _, e := range out.Exports {
			if _, err := fmt.Fprintln(w, e.URI); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	u.Log.Infof("serving %s", p.Name())
	return server.Serve(ctx, l)
}

// absolute makes an address mean the same in every folder.
func absolute(addr string) string {
	path, ok := strings.CutPrefix(addr, "unix:")
	if !ok || path == "" {
		return addr
	}
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	return "unix:" + path
}
