package service

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"buf.build/go/protovalidate"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
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

// explain turns errors into statuses with details, and tells the log and the
// audit log how calls end.
func (s *Service) explain(ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if c := callFrom(ctx); c != nil {
		c.begin()
		defer c.end()
	}
	response, err := handler(ctx, request)
	if err != nil {
		return nil, s.end(ctx, info.FullMethod, err)
	}
	return response, s.end(ctx, info.FullMethod, nil)
}

func (s *Service) explainStream(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if c := callFrom(stream.Context()); c != nil {
		c.begin()
		defer c.end()
	}
	return s.end(stream.Context(), info.FullMethod, handler(server, stream))
}

// end is what remains to be done when a call has ended with err. It returns what
// the caller gets to see.
func (s *Service) end(ctx context.Context, method string, err error) error {
	if err == nil {
		s.record(ctx, method, "ok")
		return nil
	}
	id := requestID(ctx)
	st := statusOf(err, id)
	s.logFailure(ctx, method, id, st, err)
	s.record(ctx, method, outcomeOf(err, st))
	return st.Err()
}

// reasonOf is the reason that a status names, or empty.
func reasonOf(st *status.Status) string {
	for _, d := range st.Details() {
		if e, ok := d.(*errdetails.ErrorInfo); ok {
			return e.Reason
		}
	}
	return ""
}

func (s *Service) logFailure(ctx context.Context, method, id string, st *status.Status, err error) {
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
	attrs := []slog.Attr{slog.String("method", method), slog.String("code", st.Code().String()), slog.String("request_id", id), whoIs(ctx)}
	if f := (failure{}); errors.As(err, &f) && (f.cause.Reason == reasonCallerUnknown || f.cause.Reason == reasonIdentityUnavailable) {
		attrs = append(attrs, slog.String("error", cmp.Or(f.cause.Err, error(f)).Error()))
	}
	if c := callFrom(ctx); c != nil && c.trace != "" {
		attrs = append(attrs, slog.String("trace_id", c.trace))
	}
	for _, d := range st.Details() {
		if e, ok := d.(*errdetails.ErrorInfo); ok {
			attrs = append(attrs, slog.String("reason", e.Reason), slog.String("profile", e.Metadata["profile"]))
		}
	}
	if k := callFrom(ctx); k != nil && k.policy != nil && (reasonOf(st) == string(reasonCallerDenied) || !k.outcome.decision.Allowed) {
		attrs = append(attrs, slog.String("operation", k.outcome.operation.String()), slog.String("why", s.whyDenied(k)))
	}
	s.log.LogAttrs(ctx, level, "call failed", attrs...)
}

// whyDenied says to the log what the caller must not learn. It takes as long for a
// profile that is forbidden as for one that does not exist.
func (s *Service) whyDenied(c *call) string {
	o := &c.outcome
	why := c.policy.Explain(c.caller, o.operation, o.profile, c.scopes).Why
	if !s.broker.Has(o.profile) {
		why = "there is no such profile; if there were: " + why
	}
	return why
}

// admit lets calls through whose caller is known. Health tells nothing that not
// everybody may know, and those who ask for it often cannot prove anything;
// whether they may connect at all is the handshake's matter.
func (s *Service) admit(ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if err := s.enter(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	return handler(ctx, request)
}

func (s *Service) admitStream(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if err := s.enter(stream.Context(), info.FullMethod); err != nil {
		return err
	}
	return handler(server, stream)
}

// enter is the door itself.
func (s *Service) enter(ctx context.Context, method string) error {
	c := callFrom(ctx)
	if c == nil {
		return errCallerUnknown
	}
	if c.refused != nil {
		return c.refused.error(ctx, c)
	}
	if isHealth(method) {
		return nil
	}
	if err := s.identify(c); err != nil {
		if r := s.limiter.unknown(c); r != nil {
			return r.error(ctx, c)
		}
		return err
	}
	if r := s.limiter.entered(c); r != nil {
		return r.error(ctx, c)
	}
	return nil
}

func isHealth(method string) bool { return strings.HasPrefix(method, "/grpc.health.v1.Health/") }

// validate holds our requests to the rules of the schema.
func (s *Service) validate(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if err := s.checkOurs(request); err != nil {
		return nil, err
	}
	return handler(ctx, request)
}

func (s *Service) validateStream(server any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	return handler(server, validStream{stream, s})
}

// validStream holds what arrives to the rules of the schema.
type validStream struct {
	grpc.ServerStream
	service *Service
}

func (v validStream) RecvMsg(m any) error {
	err := v.ServerStream.RecvMsg(m)
	if c := callFrom(v.Context()); c != nil && c.late != nil {
		c.late.Stop()
	}
	if err != nil {
		return err
	}
	return v.service.checkOurs(m)
}

func (s *Service) checkOurs(request any) error {
	m, ok := request.(proto.Message)
	if !ok {
		return internalError
	}
	if !isOurs(m) {
		return nil
	}
	return s.check(m)
}

// check is quick for the request that is made most often.
func (s *Service) check(m proto.Message) error {
	if why := undecoded(m); why != "" {
		return invalidField("", why)
	}
	if r, ok := m.(*pb.IssueTokenRequest); ok && len(r.GetScopes()) == 0 && r.MinLifetime == nil && r.Job == nil {
		// Not "does it exist?": how long the answer takes would tell.
		if isProfileName(r.GetProfile()) {
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

// isProfileName is the rule that the schema has for names of profiles.
func isProfileName(s string) bool {
	if len(s) == 0 || len(s) > 64 {
		return false
	}
	for i, c := range []byte(s) {
		letter := 'a' <= c && c <= 'z' || '0' <= c && c <= '9'
		if !letter && (i == 0 || i == len(s)-1 || c != '.' && c != '_' && c != '-') {
			return false
		}
	}
	return true
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
