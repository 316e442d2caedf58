package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"strconv"
	"strings"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
)

// redisConn speaks as much of RESP as a counter needs, with less work than a client library.
type redisConn struct {
	conn net.Conn
	in   *bufio.Reader
}

func dialRedis(ctx context.Context, address string) (*redisConn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return &redisConn{conn, bufio.NewReader(conn)}, nil
}

// incrBy adds n to the counter and returns what it is then.
func (r *redisConn) incrBy(n uint64) (uint64, error) {
	command := "*2\r\n$4\r\nINCR\r\n$7\r\ncounter\r\n"
	if n != 1 {
		digits := strconv.FormatUint(n, 10)
		command = fmt.Sprintf("*3\r\n$6\r\nINCRBY\r\n$7\r\ncounter\r\n$%d\r\n%s\r\n", len(digits), digits)
	}
	if _, err := r.conn.Write([]byte(command)); err != nil {
		return 0, err
	}
	line, err := r.in.ReadString('\n')
	if err != nil {
		return 0, err
	}
	text, ok := strings.CutPrefix(strings.TrimSpace(line), ":")
	if !ok {
		return 0, fmt.Errorf("redis answered %q", line)
	}
	return strconv.ParseUint(text, 10, 64)
}

func openRedis(ctx context.Context, j job) ([]asker, error) {
	return each(j, func(int) (asker, error) {
		r, err := dialRedis(ctx, j.Address)
		if err != nil {
			return nil, err
		}
		return func(context.Context) (uint64, error) {
			_, err := r.incrBy(1)
			return 1, err
		}, nil
	})
}

func openRedisGathered(ctx context.Context, j job) ([]asker, error) {
	r, err := dialRedis(ctx, j.Address)
	if err != nil {
		return nil, err
	}
	return openGathered(j, func(_ context.Context, req *nsallocv1.AllocateRequest) (uint64, error) {
		last, err := r.incrBy(req.GetCount())
		return 1<<48 | (last - req.GetCount() + 1), err
	})
}
