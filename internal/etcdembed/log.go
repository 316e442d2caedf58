package etcdembed

import (
	"context"
	"log/slog"
	"sync/atomic"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// expected are warnings that etcd gives about how this package runs it.
var expected = map[string]bool{
	"Running http and grpc server on single port. This is not recommended for production.": true,
	"simple token is not cryptographically signed":                                         true, // there are no users
}

// expectedInClose are errors that etcd reports about every listener that is closed.
var expectedInClose = map[string]bool{
	"setting up serving from embedded etcd failed.": true,
	"stopping insecure grpc server due to error":    true,
	"stopped insecure grpc server due to error":     true,
}

// zapTo is a zap logger that hands warnings and errors to a slog one. etcd tells its life at Info,
// about a hundred lines a start; nobody asked an embedded server for them.
func zapTo(logger *slog.Logger, closing *atomic.Bool) *zap.Logger {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	return zap.New(core{logger: logger, closing: closing})
}

type core struct {
	logger  *slog.Logger
	closing *atomic.Bool // Close has begun
	fields  []zapcore.Field
}

func (core) Enabled(l zapcore.Level) bool { return l >= zapcore.WarnLevel }

func (c core) With(fields []zapcore.Field) zapcore.Core {
	c.fields = append(c.fields[:len(c.fields):len(c.fields)], fields...)
	return c
}

func (c core) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if !c.Enabled(e.Level) || expected[e.Message] || c.closing.Load() && expectedInClose[e.Message] {
		return ce
	}
	return ce.AddCore(e, c)
}

func (c core) Write(e zapcore.Entry, fields []zapcore.Field) error {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range c.fields {
		f.AddTo(enc)
	}
	for _, f := range fields {
		f.AddTo(enc)
	}
	level := slog.LevelWarn
	if e.Level >= zapcore.ErrorLevel {
		level = slog.LevelError
	}
	attrs := make([]slog.Attr, 0, len(enc.Fields))
	for k, v := range enc.Fields {
		attrs = append(attrs, slog.Any(k, v))
	}
	c.logger.LogAttrs(context.Background(), level, "etcd: "+e.Message, attrs...)
	return nil
}

func (core) Sync() error { return nil }
