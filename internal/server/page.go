package server

import (
	"encoding/base64"
	"fmt"
	"strings"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

const (
	defaultPage = 100
	maxPage     = 1000
	// maxPageBytes ends a page early: a sandbox can have 4,096 namespaces, and an answer must fit a message.
	maxPageBytes = 1 << 20
)

func pageSize(asked int32) (int, error) {
	switch {
	case asked < 0 || asked > maxPage:
		return 0, invalid("page_size", fmt.Sprintf("%d is not in 0..%d", asked, maxPage))
	case asked == 0:
		return defaultPage, nil
	}
	return int(asked), nil
}

// A page token says of which list it is, and behind what the page begins. It holds no state of a
// server, so that any server goes on.

func pageToken(list, last string) string {
	return base64.RawURLEncoding.EncodeToString([]byte(list + ":" + last))
}

func afterToken(list, token string) (last string, err error) {
	if token == "" {
		return "", nil
	}
	b, err := base64.RawURLEncoding.DecodeString(token)
	last, ok := strings.CutPrefix(string(b), list+":")
	if err != nil || !ok || last == "" {
		return "", invalid("page_token", "it is not one that this list has given")
	}
	return last, nil
}

func afterSerial(list, token string) (alloc.Serial, error) {
	last, err := afterToken(list, token)
	if err != nil || last == "" {
		return 0, err
	}
	var s alloc.Serial
	if s.UnmarshalText([]byte(last)) != nil {
		return 0, invalid("page_token", "it is not one that this list has given")
	}
	return s, nil
}

func invalid(subject, msg string) *alloc.Error {
	return &alloc.Error{Reason: alloc.ReasonInvalid, Subject: subject, Msg: msg}
}
