package qmp_test

import (
	"testing"

	"go.uber.org/goleak"
)

// Whatever a test does to a client, none of its goroutines may outlive it.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
