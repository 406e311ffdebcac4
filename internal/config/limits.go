package config

import (
	configv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/config/v1"
	"github.com/tokenbroker/tokenbroker/internal/admission"
)

// limits fills in the defaults.
func limits(message *configv1.Limits) admission.Limits {
	return admission.Limits{
		CallerRate:         int(message.GetCallerRate()),
		CallerCalls:        int(message.GetCallerCalls()),
		Calls:              int(message.GetCalls()),
		Connections:        int(message.GetConnections()),
		ConnectionStreams:  int(message.GetConnectionStreams()),
		ConnectionAge:      message.GetConnectionAge().AsDuration(),
		ConnectionAgeGrace: message.GetConnectionAgeGrace().AsDuration(),
		PingInterval:       message.GetPingInterval().AsDuration(),
		Deadline:           message.GetDeadline().AsDuration(),
		HeaderSize:         int(message.GetHeaderSize()),
	}.WithDefaults()
}
