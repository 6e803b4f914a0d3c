// SPDX-License-Identifier: Apache-2.0

//go:build soak

package main_test

import "time"

const (
	// soakTime is how long TestE2ESoak goes on.
	soakTime = 10 * time.Minute
	// soakQcow has the handler qcow killed too. It enters a cluster into its tables before it counts the reference; the
	// host counts what a death in between has left uncounted before it opens the image again.
	soakQcow = true
	// stressTime is how long each setting of the runtime is put under load.
	stressTime = time.Minute
	// mixTime is how long the mixed load goes on.
	mixTime = 10 * time.Minute
	// rbdOperations is how many random operations an image in a cluster gets.
	rbdOperations = 1_000_000
)
