// SPDX-License-Identifier: Apache-2.0

//go:build soak

package main_test

import "time"

// soakTime is how long TestE2ESoak goes on.
const soakTime = 10 * time.Minute
