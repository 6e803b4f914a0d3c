// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"html"
	"strings"
)

// Colours that can be told apart on light and on dark ground.
var colours = map[string]string{
	ours: "#d9480f", gofuse: "#1c7ed6", libfuse: "#2b8a3e", nbdfuse: "#9c36b5", loop: "#868e96",
}

// Sizes in the chart, in pixels.
const (
	chartWidth = 950
	labelWidth = 350
	barHeight  = 9
	groupGap   = 12
	headHeight = 96
	footHeight = 28
	// maxSpeed is the longest bar's speed; what is faster is cut and says so.
	maxSpeed = 3.0
)

// chart draws how fast each peer is at each workload, as a multiple of the peer base, as SVG. Time counts as its
// inverse: longer bars are faster everywhere.
func chart(r *results, base string) string {
	var body strings.Builder
	y := headHeight
	plot := float64(chartWidth - labelWidth - 60)
	x := func(speed float64) float64 { return labelWidth + plot*min(speed, maxSpeed)/maxSpeed }
	for _, w := range r.Workloads {
		reference := w.find(base)
		if reference == nil {
			continue
		}
		top := y
		for _, p := range peers() {
			result := w.find(p.name)
			if result == nil {
				continue
			}
			speed := ratio(result.Median.Value, reference.Median.Value)
			if w.Unit == seconds {
				speed = ratio(reference.Median.Value, result.Median.Value)
			}
			fmt.Fprintf(&body, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"><title>%s: %s %s</title></rect>`+"\n",
				labelWidth, y, x(speed)-labelWidth, barHeight-1, colours[p.name], html.EscapeString(p.label),
				figure(result.Median.Value), w.Unit)
			fmt.Fprintf(&body, `<text class="value" x="%.1f" y="%d">%s</text>`+"\n", x(speed)+4, y+barHeight-1, figure(speed))
			y += barHeight
		}
		fmt.Fprintf(&body, `<text text-anchor="end" x="%d" y="%d">%s</text>`+"\n", labelWidth-8, (top+y)/2+4,
			html.EscapeString(w.Title))
		y += groupGap
	}
	height := y + footHeight

	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d">`+"\n",
		chartWidth, height, chartWidth, height)
	b.WriteString(`<style>text { font: 12px sans-serif; fill: #212529 } .value { font-size: 9px } ` +
		`.title { font-size: 15px; font-weight: bold } line { stroke: #adb5bd }</style>` + "\n")
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#ffffff"/>`+"\n", chartWidth, height)
	fmt.Fprintf(&b, `<text class="title" x="12" y="22">Speed as a multiple of: %s (longer is faster)</text>`+"\n",
		html.EscapeString(labelOf(base)))
	for i, p := range peers() {
		left, top := 12+i%2*440, 40+i/2*16
		fmt.Fprintf(&b, `<rect x="%d" y="%d" width="12" height="10" fill="%s"/><text x="%d" y="%d">%s</text>`+"\n",
			left, top-9, colours[p.name], left+18, top, html.EscapeString(p.label))
	}
	for tick := 0.0; tick <= maxSpeed; tick += 0.5 {
		fmt.Fprintf(&b, `<line x1="%.1f" y1="%d" x2="%.1f" y2="%d"%s/>`+"\n", x(tick), headHeight-6, x(tick), y,
			map[bool]string{true: ` style="stroke: #212529"`}[tick == 1])
		fmt.Fprintf(&b, `<text class="value" text-anchor="middle" x="%.1f" y="%d">%g</text>`+"\n", x(tick), y+12, tick)
	}
	b.WriteString(body.String())
	m := r.Machine
	fmt.Fprintf(&b, `<text class="value" x="12" y="%d">%s</text>`+"\n</svg>\n", height-6, html.EscapeString(fmt.Sprintf(
		"Medians of %d interleaved rounds; Linux %s, %d CPUs, %s", r.Rounds, m.Kernel, m.CPUs, m.Time.Format("2006-01-02"))))
	return b.String()
}

func labelOf(name string) string {
	for _, p := range peers() {
		if p.name == name {
			return p.label
		}
	}
	return name
}
