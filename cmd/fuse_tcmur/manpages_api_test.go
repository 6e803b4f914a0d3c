// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"flag"
	"go/ast"
	"go/doc"
	"go/parser"
	"go/printer"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/testbed"
)

// The pages of the two libraries against their Go source: the synopsis is what the source exports, everything in it is
// described, and the errors are those of the doc comments.

var updatePages = flag.Bool("update", false, "write the synopses of the manual pages anew")

// libraryPages maps the pages of section 3 to the packages that they describe.
var libraryPages = map[string]string{"fuse_tree.3": "fusetree", "libtcmur.3": "plugin"}

func TestManPagesAPI(t *testing.T) {
	for page, pkg := range libraryPages {
		t.Run(page, func(t *testing.T) {
			api := parseAPI(t, filepath.Join(testbed.Root(), pkg))
			checkSynopsis(t, page, api.synopsis())
			described := plainRoff(section(t, readPage(t, page), "DESCRIPTION"))
			for _, name := range api.names() {
				if !containsWord(described, name) {
					t.Errorf("%s: DESCRIPTION has no word about %s", page, name)
				}
			}
			checkErrors(t, page, api)
		})
	}
}

// checkSynopsis compares the example block of the SYNOPSIS with what it should be, or puts that there.
func checkSynopsis(t *testing.T, page, want string) {
	t.Helper()
	text := readPage(t, page)
	const begin, end = ".SH SYNOPSIS\n.EX\n", ".EE\n"
	head, rest, ok := strings.Cut(text, begin)
	old, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no SYNOPSIS with .EX and .EE", page)
	}
	if *updatePages {
		if err := os.WriteFile(pagePath(page), []byte(head+begin+want+end+tail), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(want, old); diff != "" {
		t.Errorf("%s: the SYNOPSIS is not what the package exports (-want +got): %s\n"+
			"go test ./cmd/fuse_tcmur -run TestManPagesAPI -update writes it; describe what is new in the DESCRIPTION",
			page, diff)
	}
}

// errnoInText finds names of errors; E alone and words such as EX are none.
var errnoInText = regexp.MustCompile(`\bE[A-Z0-9]{3,}\b`)

// checkErrors: a function whose doc comment names errors has a paragraph in ERRORS that names the same ones.
func checkErrors(t *testing.T, page string, api *api) {
	t.Helper()
	paragraphs := map[string][]string{}
	for paragraph := range strings.SplitSeq("\n"+section(t, readPage(t, page), "ERRORS"), "\n.TP\n") {
		heading, text, _ := strings.Cut(paragraph, "\n")
		for name := range strings.SplitSeq(plainRoff(heading), ", ") {
			paragraphs[name] = uniqueErrnos(plainRoff(text))
		}
	}
	for name, comment := range api.comments {
		if want := uniqueErrnos(comment); len(want) > 0 && !slices.Equal(want, paragraphs[name]) {
			t.Errorf("%s: ERRORS of %s are %q, the doc comment has %q", page, name, paragraphs[name], want)
		}
	}
	for name := range paragraphs {
		if _, ok := api.comments[name]; !ok && len(paragraphs[name]) > 0 {
			t.Errorf("%s: ERRORS of %s: there is no such function", page, name)
		}
	}
}

func uniqueErrnos(text string) []string {
	found := errnoInText.FindAllString(text, -1)
	slices.Sort(found)
	return slices.Compact(found)
}

// api is what a package exports.
type api struct {
	fset     *token.FileSet
	pkg      *doc.Package
	comments map[string]string // of functions and methods: "Init", "Tree.Add"
}

func parseAPI(t *testing.T, dir string) *api {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	a := &api{fset: token.NewFileSet(), comments: map[string]string{}}
	var files []*ast.File
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(a.fset, name, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
	}
	if a.pkg, err = doc.NewFromFiles(a.fset, files, "github.com/fuse-tcmur/fuse_tcmur/"+filepath.Base(dir)); err != nil {
		t.Fatal(err)
	}
	for _, f := range a.pkg.Funcs {
		a.comments[f.Name] = f.Doc
	}
	for _, typ := range a.pkg.Types {
		for _, f := range typ.Funcs {
			a.comments[f.Name] = f.Doc
		}
		for _, f := range typ.Methods {
			a.comments[typ.Name+"."+f.Name] = f.Doc
		}
	}
	return a
}

// names lists what has to be described: functions, methods, types, constants and the members of structs.
func (a *api) names() []string {
	var names []string
	values := func(all []*doc.Value) {
		for _, value := range all {
			names = append(names, value.Names...)
		}
	}
	values(a.pkg.Consts)
	for _, f := range a.pkg.Funcs {
		names = append(names, f.Name)
	}
	for _, typ := range a.pkg.Types {
		names = append(names, typ.Name)
		values(typ.Consts)
		for _, f := range append(typ.Funcs, typ.Methods...) {
			names = append(names, f.Name)
		}
		ast.Inspect(typ.Decl, func(node ast.Node) bool {
			if field, ok := node.(*ast.Field); ok {
				for _, name := range field.Names {
					if name.IsExported() {
						names = append(names, name.Name)
					}
				}
			}
			_, isFunc := node.(*ast.FuncType)
			return !isFunc
		})
	}
	return names
}

// synopsis is the package's declarations in roff, without comments.
func (a *api) synopsis() string {
	var text strings.Builder
	text.WriteString("import \"" + a.pkg.ImportPath + "\"\n")
	declare := func(decl ast.Decl) { text.WriteString(a.print(decl)) }
	values := func(all []*doc.Value) {
		for _, value := range all {
			text.WriteString("\n")
			declare(value.Decl)
		}
	}
	functions := func(all []*doc.Func) {
		if len(all) > 0 {
			text.WriteString("\n")
		}
		for _, f := range all {
			declare(f.Decl)
		}
	}
	values(a.pkg.Consts)
	functions(a.pkg.Funcs)
	for _, typ := range a.pkg.Types {
		text.WriteString("\n")
		declare(typ.Decl)
		values(typ.Consts)
		functions(typ.Funcs)
		functions(typ.Methods)
	}
	return strings.NewReplacer(`\`, `\e`, "-", `\-`, "'", `\(aq`, "`", `\(ga`, "\t", "    ").Replace(text.String())
}

// columns finds the spaces with which go/printer aligns a group of declarations.
var columns = regexp.MustCompile(`(\S) +`)

// print formats one declaration without comments and function bodies, functions in lines of 76 columns.
func (a *api) print(decl ast.Decl) string {
	ast.Inspect(decl, func(node ast.Node) bool {
		switch node := node.(type) {
		case *ast.GenDecl:
			node.Doc = nil
		case *ast.FuncDecl:
			node.Doc, node.Body = nil, nil
		case *ast.TypeSpec:
			node.Doc, node.Comment = nil, nil
		case *ast.ValueSpec:
			node.Doc, node.Comment = nil, nil
		case *ast.Field:
			node.Doc, node.Comment = nil, nil
		case *ast.StructType:
			node.Incomplete = false
		case *ast.InterfaceType:
			node.Incomplete = false
		}
		return true
	})
	var text bytes.Buffer
	config := printer.Config{Mode: printer.UseSpaces, Tabwidth: 4}
	if err := config.Fprint(&text, a.fset, decl); err != nil {
		return err.Error()
	}
	var out strings.Builder
	_, isFunc := decl.(*ast.FuncDecl)
	for line := range strings.Lines(text.String()) {
		if line = strings.TrimRight(line, "\n"); line == "" {
			continue
		}
		if !isFunc {
			line = columns.ReplaceAllString(line, "$1 ")
		}
		const width = 76
		for isFunc && len(line) > width {
			at := max(strings.LastIndex(line[:width], ", "), strings.LastIndex(line[:width], ") ")) + 1
			if at < width/2 {
				break
			}
			out.WriteString(line[:at] + "\n")
			line = "        " + line[at+1:]
		}
		out.WriteString(line + "\n")
	}
	return out.String()
}
