package main

import (
	"fmt"
	"io"
	"strings"
)

// cell is one field of a table.
type cell struct {
	text  string
	style style
}

// in makes a styled cell.
func in(s style, text string) cell { return cell{text, s} }

// table aligns rows under titles. It knows wide characters, and measures text before it colours it.
type table struct {
	head  []string
	rows  [][]cell
	right map[int]bool // columns that are aligned at their end: numbers
}

// newTable starts a table. A title that ends in "#" is of a column of numbers.
func newTable(titles ...string) *table {
	t := &table{right: map[int]bool{}}
	for i, title := range titles {
		title, number := strings.CutSuffix(title, "#")
		t.head = append(t.head, title)
		t.right[i] = number
	}
	return t
}

// row adds a row of strings, cells, and whatever fmt can print. An empty text shows as "-".
func (t *table) row(values ...any) {
	row := make([]cell, len(values))
	for i, v := range values {
		switch v := v.(type) {
		case cell:
			row[i] = v
		case string:
			row[i].text = v
		default:
			row[i].text = fmt.Sprint(v)
		}
		row[i].text = printable(row[i].text)
		if row[i].text == "" {
			row[i] = in(styleDim, "-")
		}
	}
	t.rows = append(t.rows, row)
}

// write prints the table. most is the width at which the last column is cut; 0 cuts nothing.
func (t *table) write(w io.Writer, p palette, most int) error {
	widths := make([]int, len(t.head))
	for i, title := range t.head {
		widths[i] = columns(title)
		for _, row := range t.rows {
			if i < len(row) {
				widths[i] = max(widths[i], columns(row[i].text))
			}
		}
	}
	var b strings.Builder
	line := func(row []cell) {
		used := 0
		for i, c := range row {
			last := i == len(row)-1
			if last && most > 0 && most-used >= 4 { // less tells nobody anything: let it wrap
				c.text = cut(c.text, most-used)
			}
			pad := strings.Repeat(" ", max(0, widths[i]-columns(c.text)))
			switch {
			case t.right[i]:
				b.WriteString(pad + p.do(c.style, c.text))
			case last:
				b.WriteString(p.do(c.style, c.text))
			default:
				b.WriteString(p.do(c.style, c.text) + pad)
			}
			if !last {
				b.WriteString("  ")
			}
			used += widths[i] + 2
		}
		b.WriteByte('\n')
	}
	head := make([]cell, len(t.head))
	for i, title := range t.head {
		head[i] = in(styleHead, title)
	}
	line(head)
	for _, row := range t.rows {
		line(row)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// printTable writes a table to standard output, as wide as its terminal.
func (c *cli) printTable(t *table) error {
	most, _ := terminalWidth(c.out)
	return t.write(c.out, c.paint(c.out), most)
}

// fields is a headline of names and values above a table.
type fields struct{ t table }

// add puts down a value; without a name it belongs to the one above.
func (f *fields) add(name string, value any) {
	f.t.row(name, value)
	label := &f.t.rows[len(f.t.rows)-1][0]
	*label = in(styleDim, "")
	if name != "" {
		label.text = printable(name) + ":"
	}
}

// text is the aligned lines. most is the width at which values wrap; 0 wraps nothing.
func (f *fields) text(p palette, most int) string {
	var b strings.Builder
	wide := 0
	for _, row := range f.t.rows {
		wide = max(wide, columns(row[0].text))
	}
	for _, row := range f.t.rows {
		label, value := row[0], row[1]
		pad := strings.Repeat(" ", wide-columns(label.text)+1)
		b.WriteString(p.do(label.style, label.text) + pad + p.do(value.style, wrap(value.text, most, wide+1)) + "\n")
	}
	return b.String()
}

// fieldText is the lines as standard output takes them.
func (c *cli) fieldText(f fields) string {
	most, _ := terminalWidth(c.out)
	return f.text(c.paint(c.out), most)
}

// wrap breaks a text at blanks so that it fits between margin and most columns. 0 wraps nothing.
func wrap(text string, most, margin int) string {
	room := most - margin
	if most == 0 || room < 20 {
		return text
	}
	var b strings.Builder
	used := 0
	for i, word := range strings.Fields(text) {
		w := columns(word)
		switch {
		case i == 0:
		case used+1+w > room:
			b.WriteString("\n" + strings.Repeat(" ", margin))
			used = 0
		default:
			b.WriteByte(' ')
			used++
		}
		b.WriteString(word)
		used += w
	}
	return b.String()
}
