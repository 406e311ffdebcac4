// Package clients holds the tests that run the client libraries of clients/ each
// in its own language, over mTLS, against a real broker. They are built with the
// tag clients; "make clients" builds the libraries and runs them.
//
// Each library has a program of tests, clients/LANGUAGE/test.sh. It runs on a
// stage of its own: a broker, a token endpoint, and a resource server that looks
// at what it is shown. By requests to the stage the program has the broker
// stopped, tokens revoked and certificates replaced, and learns what the others
// have seen: what a library believes to have done is not asked.
package clients
