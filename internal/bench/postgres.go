package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
)

// postgresUser is the superuser, and the database, of our own instance.
const postgresUser = "postgres"

// postgresConn speaks as much of PostgreSQL's protocol (version 3, prepared statements) as a sequence
// needs, with less work than a client library.
type postgresConn struct {
	conn net.Conn
	in   *bufio.Reader
}

func dialPostgres(ctx context.Context, address string) (*postgresConn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	p := &postgresConn{conn, bufio.NewReader(conn)}
	start := binary.BigEndian.AppendUint32(nil, 3<<16)
	start = append(start, "user\x00"+postgresUser+"\x00database\x00"+postgresUser+"\x00\x00"...)
	if _, err := p.ask(append(binary.BigEndian.AppendUint32(nil, uint32(len(start)+4)), start...)); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return p, nil
}

// message has a type, the length of all but that, and a body.
func message(kind byte, body string) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{kind}, uint32(len(body)+4)), body...)
}

// ask sends messages, waits until the server is ready for more, and returns the last row that came.
func (p *postgresConn) ask(messages ...[]byte) (row []byte, err error) {
	var all []byte
	for _, m := range messages {
		all = append(all, m...)
	}
	if _, err := p.conn.Write(all); err != nil {
		return nil, err
	}
	for {
		head := make([]byte, 5)
		if _, err := io.ReadFull(p.in, head); err != nil {
			return nil, err
		}
		body := make([]byte, max(int(binary.BigEndian.Uint32(head[1:]))-4, 0))
		if _, err := io.ReadFull(p.in, body); err != nil {
			return nil, err
		}
		switch head[0] {
		case 'E':
			return nil, fmt.Errorf("postgres: %s", strings.ReplaceAll(string(body), "\x00", " "))
		case 'R':
			if binary.BigEndian.Uint32(body) != 0 {
				return nil, errors.New("postgres: it asks for a password")
			}
		case 'D':
			row = body
		case 'Z':
			return row, nil
		}
	}
}

const sequence = "create sequence if not exists bench\x00"

func openPostgres(ctx context.Context, j job) ([]asker, error) {
	// Bind the unnamed statement, execute it, and synchronize: one round trip.
	bind, execute, sync := message('B', "\x00\x00\x00\x00\x00\x00\x00\x00"), message('E', "\x00\x00\x00\x00\x00"), message('S', "")
	return each(j, func(int) (asker, error) {
		p, err := dialPostgres(ctx, j.Address)
		if err != nil {
			return nil, err
		}
		if _, err := p.ask(message('P', "\x00select nextval('bench')\x00\x00\x00"), sync); err != nil {
			return nil, err
		}
		return func(context.Context) (uint64, error) {
			row, err := p.ask(bind, execute, sync)
			if err == nil && len(row) == 0 {
				err = errors.New("postgres: nextval has no row")
			}
			return 1, err
		}, nil
	})
}
