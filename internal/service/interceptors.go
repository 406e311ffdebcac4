package service

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"buf.build/go/protovalidate"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/tokenbroker/tokenbroker/internal/broker"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// requests are all messages that callers send.
var requests = []proto.Message{
	&pb.IssueTokenRequest{}, &pb.RefreshTokenRequest{}, &pb.WatchTokenRequest{}, &pb.RevokeTokenRequest{}, &pb.WhoAmIRequest{},
	&pb.ListProfilesRequest{}, &pb.GetProfileRequest{}, &pb.StartAuthorizationRequest{}, &pb.CompleteAuthorizationRequest{},
	&pb.ResetProfileRequest{}, &pb.CreateClientRequest{}, &pb.CreateClientSecretRequest{}, &pb.RotateClientSecretRequest{},
}

// requestIDHeader is read from the caller, and returned in the metadata of
// errors.
const requestIDHeader = "x-request-id"

// explain turns errors into statuses with details, and logs each of them once.
func (s *Service) explain(ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	response, err := handler(ctx, request)
	if err == nil {
		return response, nil
	}
	id := requestID(ctx)
	st := statusOf(err, id)
	s.logFailure(ctx, info.FullMethod, id, st)
	return nil, st.Err()
}

func (s *Service) logFailure(ctx context.Context, method, id string, st *status.Status) {
	level := slog.LevelInfo
	switch st.Code() {
	case codes.Internal, codes.Unknown:
		level = slog.LevelError
	case codes.Unavailable, codes.FailedPrecondition, codes.ResourceExhausted, codes.DeadlineExceeded, codes.Canceled:
		// What goes wrong at an endpoint is logged once per attempt, by
		// the broker; a line per caller would only repeat it.
		level = slog.LevelDebug
	}
	if !s.log.Enabled(ctx, level) {
		return
	}
	attrs := []slog.Attr{slog.String("method", method), slog.String("code", st.Code().String()), slog.String("request_id", id)}
	if c, ok := callerFrom(ctx); ok {
		attrs = append(attrs, slog.String("caller", c.name))
	}
	for _, d := range st.Details() {
		if e, ok := d.(*errdetails.ErrorInfo); ok {
			attrs = append(attrs, slog.String("reason", e.Reason), slog.String("profile", e.Metadata["profile"]))
		}
	}
	s.log.LogAttrs(ctx, level, "call failed", attrs...)
}

// requestID is the caller's own id for the call, if it is harmless to log, or a
// new one.
func requestID(ctx context.Context) string {
	if values := metadata.ValueFromIncomingContext(ctx, requestIDHeader); len(values) == 1 && harmless(values[0]) {
		return values[0]
	}
	return rand.Text()[:16]
}

func harmless(id string) bool {
	if id == "" || len(id) > 64 {
		return false
	}
	for _, c := range []byte(id) {
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_' || c == '.') {
			return false
		}
	}
	return true
}

// validate holds our requests to the rules of the schema. Callers without an
// identity do not get that far.
func (s *Service) validate(ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	m, ok := request.(proto.Message)
	if !ok {
		return nil, internalError
	}
	if isOurs(m) {
		if _, known := callerFrom(ctx); !known {
			return nil, errCallerUnknown
		}
		if err := s.check(m); err != nil {
			return nil, err
		}
	}
	return handler(ctx, request)
}

// check is quick for the request that is made most often.
func (s *Service) check(m proto.Message) error {
	if why := undecoded(m); why != "" {
		return invalidField("", why)
	}
	if r, ok := m.(*pb.IssueTokenRequest); ok && len(r.GetScopes()) == 0 && r.MinLifetime == nil && r.Job == nil {
		if s.broker.Has(r.GetProfile()) { // its name met the same rule
			return nil
		}
	}
	if field := endless(m); field != "" {
		return invalidField(field, fmt.Sprintf("must have no more than %d items", mostItems))
	}
	if d, ok := m.(interface{ GetMinLifetime() *durationpb.Duration }); ok && d.GetMinLifetime() != nil {
		if err := d.GetMinLifetime().CheckValid(); err != nil {
			return invalidField("min_lifetime", "seconds and nanos must have the same sign, and nanos less than a second")
		}
	}
	err := s.validator.Validate(m)
	var invalid *protovalidate.ValidationError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &invalid):
		return fromViolations(invalid)
	}
	s.log.Error("a rule of the schema could not be evaluated", "request", string(m.ProtoReflect().Descriptor().Name()), "error", err)
	return internalError
}

// mostItems is more than any list of the schema may have. Beyond it the rules
// are not even tried: they look at every item.
const mostItems = 1000

// endless is a list of the request that is longer than that.
func endless(m proto.Message) (field string) {
	m.ProtoReflect().Range(func(d protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if d.IsList() && v.List().Len() > mostItems {
			field = string(d.Name())
		}
		return field == ""
	})
	return field
}

// mostViolations bounds what an answer lists: it travels in headers, which many
// clients limit to 8 KiB.
const mostViolations = 10

// fromViolations lists the fields that are wrong.
func fromViolations(invalid *protovalidate.ValidationError) error {
	var fields []*errdetails.BadRequest_FieldViolation
	for i, v := range invalid.Violations {
		if i == mostViolations {
			fields = append(fields, &errdetails.BadRequest_FieldViolation{Description: fmt.Sprintf("and %d more", len(invalid.Violations)-i)})
			break
		}
		fields = append(fields, &errdetails.BadRequest_FieldViolation{
			Field: protovalidate.FieldPathString(v.Proto.GetField()), Description: v.Proto.GetMessage(), Reason: v.Proto.GetRuleId(),
		})
	}
	return badRequest(fields...)
}

func invalidField(field, description string) error {
	return badRequest(&errdetails.BadRequest_FieldViolation{Field: field, Description: description})
}

func badRequest(fields ...*errdetails.BadRequest_FieldViolation) error {
	texts := make([]string, len(fields))
	for i, f := range fields {
		texts[i] = strings.TrimPrefix(f.Field+": "+f.Description, ": ")
	}
	return failure{
		cause:  &broker.Error{Reason: broker.ReasonInvalidRequest, Text: "the request is not valid: " + strings.Join(texts, "; ")},
		fields: fields,
	}
}
