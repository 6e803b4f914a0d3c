// SPDX-License-Identifier: Apache-2.0

//go:build soak

package plugin_test

import (
	"testing"
	"time"
)

// blastWindow is for how long TestBlastRadius counts what the bystanders get done, before and during each fault.
const blastWindow = time.Second

// TestSoakBlastRadiusUnpaced reports what faults leave of the throughput of bystanders that take what they can get. It
// asserts what TestBlastRadius does but for that: on two processors a recovery is felt.
func TestSoakBlastRadiusUnpaced(t *testing.T) { blastRadius(t, 0) }
