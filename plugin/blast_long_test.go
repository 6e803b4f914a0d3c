// SPDX-License-Identifier: Apache-2.0

//go:build soak

package plugin_test

import "time"

// blastWindow is for how long TestBlastRadius counts what the bystanders get done, before and during each fault.
const blastWindow = time.Second
