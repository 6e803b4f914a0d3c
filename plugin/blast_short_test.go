// SPDX-License-Identifier: Apache-2.0

//go:build !soak

package plugin_test

import "time"

// blastWindow is for how long TestBlastRadius counts what the bystanders get done: here it does not, which takes
// longer than the rest and a machine that has nothing else to do.
const blastWindow time.Duration = 0
