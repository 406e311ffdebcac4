// Package fleet tests several replicas of the broker that share a Redis, as real
// processes, while what they depend on fails: Redis, the network, the token
// endpoint, their own machines.
//
// The harness is in the tests' files. What is here is a crowd of callers. It
// runs as a program of its own, so that ten thousand of them do not compete with
// the race detector of the tests for the processor, and what they measure is the
// fleet.
package fleet

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// Question is what a caller asks for.
type Question struct {
	Profile string
	Scopes  []string
	// MinLifetime that the token must still have.
	MinLifetime time.Duration
	// Rejected is the id of the token that a resource server refused; empty
	// for a caller that reports none.
	Rejected string
}

// Answer is what a caller got, and when.
type Answer struct {
	Question Question
	// Replica that answered, by its place in the fleet.
	Replica int
	// Begin of the first try, and End of the last.
	Begin, End time.Time
	// Tries that it took.
	Tries int

	// TokenID, and the rest down to Ends, of the token; empty with an error.
	TokenID string
	Source  string // as the API calls it, without SOURCE_
	Issue   time.Time
	Expire  time.Time
	// Ends is when the token really ends: the claim in it.
	Ends time.Time

	// Code is OK without an error.
	Code       codes.Code
	Reason     string // of the error's ErrorInfo
	Text       string
	RetryAfter time.Duration
}

// OK reports whether the caller has a token.
func (a Answer) OK() bool { return a.Code == codes.OK }

func (a Answer) String() string {
	took := a.End.Sub(a.Begin).Round(time.Millisecond)
	if a.OK() {
		return fmt.Sprintf("replica %d: %s from %s after %v, %d tries", a.Replica, a.TokenID, a.Source, took, a.Tries)
	}
	return fmt.Sprintf("replica %d: %v %s after %v, %d tries: %s", a.Replica, a.Code, a.Reason, took, a.Tries, a.Text)
}

// Dial returns a connection to a replica, which connects when it is used.
func Dial(address string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		// A replica that was restarted is found again at once.
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: 5 * time.Second}))
}

// Ask makes one call.
func Ask(ctx context.Context, conn grpc.ClientConnInterface, replica int, q Question) Answer {
	client := pb.NewTokenBrokerClient(conn)
	a := Answer{Question: q, Replica: replica, Begin: time.Now(), Tries: 1}
	var r interface {
		GetToken() *pb.Token
		GetSource() pb.Source
	}
	var err error
	if q.Rejected == "" {
		r, err = client.IssueToken(ctx, &pb.IssueTokenRequest{Profile: q.Profile, Scopes: q.Scopes, MinLifetime: duration(q.MinLifetime)})
	} else {
		r, err = client.RefreshToken(ctx, &pb.RefreshTokenRequest{
			Profile: q.Profile, Scopes: q.Scopes, MinLifetime: duration(q.MinLifetime), RejectedTokenId: q.Rejected,
		})
	}
	a.End = time.Now()
	if err != nil {
		a.fail(err)
		return a
	}
	t := r.GetToken()
	a.TokenID, a.Source = t.GetId(), strings.TrimPrefix(r.GetSource().String(), "SOURCE_")
	a.Issue, a.Expire, a.Ends = t.GetIssueTime().AsTime(), t.GetExpireTime().AsTime(), end(t.GetAccessToken())
	return a
}

func duration(d time.Duration) *durationpb.Duration {
	if d == 0 {
		return nil
	}
	return durationpb.New(d)
}

func (a *Answer) fail(err error) {
	s := status.Convert(err)
	a.Code, a.Text = s.Code(), s.Message()
	for _, detail := range s.Details() {
		switch d := detail.(type) {
		case *errdetails.ErrorInfo:
			a.Reason = d.GetReason()
		case *errdetails.RetryInfo:
			a.RetryAfter = d.GetRetryDelay().AsDuration()
		}
	}
}

// ends remembers the ends of tokens: most callers get the same one.
var ends sync.Map // access token to time.Time

// end reads the claim "exp" of a token that is a JWT.
func end(accessToken string) time.Time {
	if t, ok := ends.Load(accessToken); ok {
		return t.(time.Time)
	}
	var claims struct {
		Expiry int64 `json:"exp"`
	}
	parts := strings.Split(accessToken, ".")
	if len(parts) != 3 {
		return time.Time{}
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || json.Unmarshal(payload, &claims) != nil {
		return time.Time{}
	}
	t := time.Unix(claims.Expiry, 0)
	ends.Store(accessToken, t)
	return t
}

// Crowd is many callers at once.
type Crowd struct {
	Question
	// Replicas are their addresses. Caller i asks replica i first, modulo.
	Replicas []string
	// Callers that ask at the same time.
	Callers int
	// Connections to each replica.
	Connections int
	// Timeout of one call.
	Timeout time.Duration
	// Again has each caller ask again, Pause after its last answer, until Run's
	// ctx ends. Otherwise each asks once.
	Again bool
	Pause time.Duration
	// Patience has callers retry UNAVAILABLE at the next replica for so long,
	// as gRPC's service configs do.
	Patience time.Duration
}

// Run connects, calls ready, waits for begin to be closed, and returns what
// the callers got. When ctx ends, calls under way still finish.
func (c Crowd) Run(ctx context.Context, ready func(), begin <-chan struct{}) ([]Answer, error) {
	conns := make([][]*grpc.ClientConn, len(c.Replicas))
	for i, address := range c.Replicas {
		for range max(c.Connections, 1) {
			conn, err := Dial(address)
			if err != nil {
				return nil, err
			}
			defer conn.Close()
			conn.Connect()
			conns[i] = append(conns[i], conn)
		}
	}
	for _, replica := range conns {
		for _, conn := range replica {
			if err := connected(ctx, conn); err != nil {
				return nil, err
			}
		}
	}
	ready()
	<-begin

	got := make([][]Answer, c.Callers)
	var callers sync.WaitGroup
	for i := range c.Callers {
		callers.Go(func() {
			for {
				got[i] = append(got[i], c.ask(conns, i))
				if !c.Again || !pause(ctx, c.Pause) {
					return
				}
			}
		})
	}
	callers.Wait()
	var all []Answer
	for _, answers := range got {
		all = append(all, answers...)
	}
	return all, nil
}

// connected waits for a connection, so that the first call does not.
func connected(ctx context.Context, conn *grpc.ClientConn) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for state := conn.GetState(); state.String() != "READY"; state = conn.GetState() {
		if !conn.WaitForStateChange(ctx, state) {
			return fmt.Errorf("connecting to %s: still %v after 10 s", conn.Target(), state)
		}
	}
	return nil
}

// ask makes one call of one caller, with its retries.
func (c Crowd) ask(conns [][]*grpc.ClientConn, caller int) Answer {
	var first Answer
	for try := 0; ; try++ {
		replica := (caller + try) % len(conns)
		conn := conns[replica][caller/len(conns)%len(conns[replica])]
		// The crowd's own end does not cut a call short.
		ctx, cancel := context.WithTimeout(context.Background(), c.Timeout)
		a := Ask(ctx, conn, replica, c.Question)
		cancel()
		if try == 0 {
			first = a
		}
		a.Begin, a.Tries = first.Begin, try+1
		if a.Code != codes.Unavailable || a.End.Sub(a.Begin) >= c.Patience {
			return a
		}
		time.Sleep(min(10*time.Millisecond<<min(try, 6), 500*time.Millisecond))
	}
}

// pause returns false if ctx ends before.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
