package client

import (
	"context"
	"fmt"

	"google.golang.org/grpc/credentials"
)

// PerRPCCredentials returns credentials for connections to gRPC servers that take
// the token. They need TLS: no connection can be made with them without, and no
// token leaves on one that does not keep it private. A server in the same machine is
// reached over a unix socket with google.golang.org/grpc/credentials/local.
//
// A server that refuses the token answers UNAUTHENTICATED; say so with Rejected, and
// call again.
func (s *TokenSource) PerRPCCredentials() credentials.PerRPCCredentials { return perRPC{s} }

type perRPC struct{ source *TokenSource }

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (p perRPC) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	info, _ := credentials.RequestInfoFromContext(ctx)
	if err := credentials.CheckSecurityLevel(info.AuthInfo, credentials.PrivacyAndIntegrity); err != nil {
		return nil, fmt.Errorf("the token would go over a connection in clear: %w", err)
	}
	token, err := p.source.TokenContext(ctx)
	if err != nil {
		return nil, err
	}
	return map[string]string{"authorization": token.Type() + " " + token.AccessToken}, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials.
func (p perRPC) RequireTransportSecurity() bool { return true }
