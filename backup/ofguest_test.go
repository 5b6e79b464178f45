package backup

import (
	"errors"
	"fmt"
	"testing"
)

func TestErrorNamesGuestOnce(t *testing.T) {
	t.Parallel()
	cause := errors.New("read-only file system")
	for _, err := range []error{cause, fmt.Errorf("guest web: %w", cause)} {
		if got := ofGuest("web", err); got.Error() != "guest web: read-only file system" || !errors.Is(got, cause) {
			t.Errorf("%v", got)
		}
	}
	if got := ofGuest("web", errors.New("guest webserver: x")); got.Error() != "guest web: guest webserver: x" {
		t.Errorf("%v", got)
	}
}
