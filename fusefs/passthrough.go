package fusefs

import (
	"os"

	"qmchain/chain/image"
)

// file returns the file that a disk is, if it is one raw file, as in some foreign sets: the kernel can read that at its own
// speed. On a share it could not be opened anew when the share has gone and come back, so there it is nil.
func (o *openDisk) file() *os.File {
	img, ok := o.now.Load().Image.(image.Filer)
	if !ok {
		return nil
	}
	f, err := img.File()
	if f == nil || err != nil {
		return nil // a read will tell what is wrong
	}
	if !image.IsLocal(int(f.Fd())) {
		_ = f.Close()
		return nil
	}
	return f
}
