package backup

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

const fleeceSuffix = ".fleece"

// fleecePath names a fleece image after the run that it belongs to.
func fleecePath(dir, lock string, i int) string {
	return filepath.Join(dir, fmt.Sprintf("%s.%d%s", lock, i, fleeceSuffix))
}

// sweepFleece removes the fleece images of dead runs. A run leaves one only when it is killed between making it and QEMU's
// opening it.
func sweepFleece(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("folder for fleece images: %w", err)
	}
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), fleeceSuffix)
		if !ok {
			continue
		}
		lock, _, _ := strings.Cut(name, ".")
		if o, ok := lockOwner(lock); !ok || !o.dead() {
			continue
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !os.IsNotExist(err) {
			return fmt.Errorf("fleece image of a run that did not end: %w", err)
		}
	}
	return nil
}
