// SPDX-License-Identifier: Apache-2.0

package main

import "testing"

func TestMedianAndSpread(t *testing.T) {
	for _, test := range []struct {
		values         []float64
		median, spread float64
	}{
		{nil, 0, 0},
		{[]float64{7}, 7, 0},
		{[]float64{3, 1, 2}, 2, 1},
		{[]float64{4, 1, 2, 3}, 2.5, 1.2},
		{[]float64{0, 0}, 0, 0},
	} {
		if got := median(test.values); got != test.median {
			t.Errorf("median of %v: %v, want %v", test.values, got, test.median)
		}
		if got := spread(test.values); got != test.spread {
			t.Errorf("spread of %v: %v, want %v", test.values, got, test.spread)
		}
	}
	values := []float64{3, 1, 2}
	if median(values); values[0] != 3 {
		t.Error("median has changed the order of its argument")
	}
	if got := ratio(1, 0); got != 0 {
		t.Errorf("1/0 is %v, want 0 for unknown", got)
	}
}
