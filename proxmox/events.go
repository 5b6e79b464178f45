package proxmox

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"time"
)

// eventsLimit bounds the conversation with qmeventd, which is a short one.
const eventsLimit = 5 * time.Second

// KeepAlive asks qmeventd to leave the VM's QEMU alone when its guest powers off, until it is closed: QEMU then stays in
// the state "shutdown". Otherwise qmeventd ends it at once, in mid-backup. It is what vzdump does, in the same words.
func (h Host) KeepAlive(ctx context.Context, vmid VMID) (io.Closer, error) {
	ctx, cancel := context.WithTimeout(ctx, eventsLimit)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", h.Events)
	if err != nil {
		return nil, fmt.Errorf("qmeventd: %w", err)
	}
	request, err := json.Marshal(map[string]any{"vzdump": map[string]string{"vmid": vmid.String()}})
	if err == nil {
		deadline, _ := ctx.Deadline()
		err = conn.SetWriteDeadline(deadline)
	}
	if err == nil {
		_, err = conn.Write(request)
	}
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("qmeventd: %w", err)
	}
	return conn, nil
}
