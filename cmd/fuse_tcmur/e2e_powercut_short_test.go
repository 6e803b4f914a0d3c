// SPDX-License-Identifier: Apache-2.0

//go:build !soak

package main_test

const (
	// powerCuts is how often at least each test of the power-cut lab cuts the power.
	powerCuts = 50
	// powerSteps is how many changes are promised to be durable in each.
	powerSteps = 50
)
