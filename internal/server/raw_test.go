package server

import (
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

// rawMessage is sent as it is, whatever it says.
type rawMessage []byte

var rawCodec = grpc.ForceCodec(codec{})

type codec struct{}

func (codec) Marshal(v any) ([]byte, error) {
	raw, ok := v.(*rawMessage)
	if !ok {
		return nil, fmt.Errorf("%T is not raw", v)
	}
	return *raw, nil
}

func (codec) Unmarshal(b []byte, v any) error { return proto.Unmarshal(b, v.(proto.Message)) }

func (codec) Name() string { return "proto" }
