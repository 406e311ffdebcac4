// Package clients holds what the client libraries have in common. Those of other
// languages are below it; the one for Go is in package client.
package clients

import _ "embed" // for the service config

// ServiceConfig says how calls to the broker are balanced and retried: the content of
// service_config.json, which all libraries use
// (https://github.com/grpc/grpc/blob/master/doc/service_config.md).
//
//go:embed service_config.json
var ServiceConfig string
