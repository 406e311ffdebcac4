package service

import (
	"strings"
	"time"

	"google.golang.org/grpc"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// quickly is what calls may take that wait for nobody, whatever server.limits
// says beyond it.
const quickly = 10 * time.Second

// quick are the methods that answer from memory. All others may ask the store
// or an authorization server, and get as long as server.limits.deadline says.
var quick = map[string]bool{
	pb.TokenBroker_WhoAmI_FullMethodName:        true,
	pb.ProfileAdmin_ListProfiles_FullMethodName: true,
	pb.ProfileAdmin_GetProfile_FullMethodName:   true,
	"/grpc.health.v1.Health/Check":              true,
	"/grpc.health.v1.Health/List":               true,
}

// method is what there is to know of a method before its handler runs.
type method struct {
	stream bool // it has no deadline but its caller's
	health bool // of grpc.health.v1
	quick  bool
}

// methodsOf are all methods that the server has, by their full names.
func methodsOf(s *grpc.Server) map[string]*method {
	all := map[string]*method{}
	for service, info := range s.GetServiceInfo() {
		for _, m := range info.Methods {
			name := "/" + service + "/" + m.Name
			all[name] = &method{
				stream: m.IsClientStream || m.IsServerStream,
				health: strings.HasPrefix(service, "grpc.health."),
				quick:  quick[name],
			}
		}
	}
	return all
}

// longest is what a call of the method may take.
func (m *method) longest(deadline time.Duration) time.Duration {
	if m.quick {
		return min(quickly, deadline)
	}
	return deadline
}
