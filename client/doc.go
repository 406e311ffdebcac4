// Package client gives Go programs the access tokens of a Token Broker.
//
//	c, err := client.New() // where the environment says: BROKER_ADDRESS, BROKER_CA and so on
//	if err != nil { … }
//	defer c.Close()
//	source := c.TokenSource("invoices")
//	web := &http.Client{Transport: source.Transport(nil)}
//
// A [TokenSource] follows one token. Its first use opens a stream on which the broker
// sends each token before its predecessor ends, so from then on a token is a look
// into memory: without a call, a lock or an allocation. It is an
// [golang.org/x/oauth2.TokenSource], so whatever takes one of those takes it.
//
// The broker may go away. A source goes on with the token that it has, comes back to
// the broker by itself, and only when no good token is at hand does anybody hear of
// it. A token is good until 10 seconds before it ends, or a tenth of its life if that is
// less.
//
// [TokenSource.Transport] is for HTTP: it adds the token to requests, and when a
// server answers 401 it reports the token to the broker, once however many requests
// saw it, and sends the request again with the successor. With
// [TokenSource.PerRPCCredentials] gRPC servers are called. Where neither fits, take
// the token from [TokenSource.TokenContext], say so with [TokenSource.Rejected] when a
// server refuses it, or follow each to its successor with [TokenSource.Next].
//
// Every error is an [Error] with the broker's code and reason. No error, and nothing
// that this package makes, shows a token when it is printed; only an [oauth2.Token]
// does, because it is not ours.
//
// A Client has one connection, and reads its certificate files again for each
// handshake, and its token file for each call: what replaces them is used without a
// restart. The broker takes 250 streams on one connection by default
// (connection_streams): a program with more than 200 sources at a time uses several
// clients, or closes those sources whose job is done.
//
// What clients in other languages do alike is in clients/README.md.
package client
