package pveguest

import (
	"context"
	"errors"
	"fmt"
	"time"

	"qmchain/proxmox"
)

const (
	// aliveInterval is how often the keep-alive is said again: the end of somebody else's ends ours as well.
	aliveInterval = time.Second
	// aliveLimit bounds the waiting until it can be ended without harm.
	aliveLimit = 20 * time.Second
)

// keepAlive has qmeventd leave the VM's QEMU to us, also when others do the same and end before us. With a nil error letGo can
// be called in any case.
func (vm *VM) keepAlive(ctx context.Context) (letGo func(context.Context), err error) {
	if vm.Process == nil || vm.site.InHook && vm.Config.Lock() == "backup" {
		return func(context.Context) {}, nil // there is nothing to keep, or it is vzdump that does
	}
	status, err := vm.site.Host.Status(ctx, vm.ID)
	if err == nil && !proxmox.Spares(status) {
		err = fmt.Errorf("the guest is %s, and qmeventd would end its QEMU after us", status)
	}
	if err != nil {
		return nil, err
	}
	alive, err := vm.site.Host.KeepAlive(ctx, vm.ID)
	if err != nil {
		return nil, err
	}
	repeat, stop := context.WithCancel(context.WithoutCancel(ctx)) // an interrupted run needs QEMU to undo what it did
	done := make(chan struct{})
	go func() {
		defer close(done)
		warned := false
		for {
			select {
			case <-repeat.Done():
				return
			case <-time.After(aliveInterval):
			}
			if err := alive.Repeat(repeat); err != nil && repeat.Err() == nil && !warned {
				warned = true
				vm.site.Log.Warnf("should the guest power off, the backup fails: %v", err)
			}
		}
	}()
	return func(ctx context.Context) {
		vm.awaitHarmless(ctx)
		stop()
		<-done
		_ = alive.Close()
	}, nil
}

// awaitHarmless waits until the end of our keep-alive harms nobody, for a while.
func (vm *VM) awaitHarmless(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), aliveLimit) // the giving back of the lock may have used up ctx
	defer cancel()
	for waited := false; ; waited = true {
		err := vm.harm(ctx)
		if err == nil {
			return
		}
		if !waited {
			vm.site.Log.Infof("VM %s: its QEMU is kept alive for a while: %v", vm.ID, err)
		}
		select {
		case <-ctx.Done():
			vm.site.Log.Warnf("VM %s: its QEMU is not kept alive any more, and may end: %v", vm.ID, err)
			return
		case <-time.After(aliveInterval):
		}
	}
}

// harm is whom the end of our keep-alive would harm now.
func (vm *VM) harm(ctx context.Context) error {
	// Ours is gone by now, if it is not left.
	if vm.LockLeft == nil {
		switch now, err := vm.site.Host.Config(vm.ID); {
		case errors.Is(err, proxmox.ErrNotFound), errors.Is(err, proxmox.ErrElsewhere): // the VM has gone
		case err != nil:
			return err
		case now.Lock() == "backup":
			return errors.New("another backup has begun")
		}
	}
	status, err := vm.site.Host.Status(ctx, vm.ID)
	switch {
	case err != nil:
		return err
	case proxmox.Spares(status), status == proxmox.Stopped, status == "shutdown": // a QEMU in shutdown is to end
		return nil
	}
	return fmt.Errorf("qmeventd ends the QEMU of a guest that is %s", status)
}
