package client_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"net/http"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/tokenbroker/tokenbroker/client"
)

// A program that calls an HTTP API. The environment says where the broker is.
func Example() {
	c, err := client.New()
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	vantage := &http.Client{Transport: c.TokenSource("invoices").Transport(nil), Timeout: time.Minute}

	answer, err := vantage.Get("https://vantage-eu.abbyy.com/api/publicapi/v1/skills")
	var refused *client.Error
	switch {
	case errors.As(err, &refused) && refused.Reason == client.ReasonCallerDenied:
		log.Fatalf("ask for a policy for %s", refused.Metadata["caller"])
	case err != nil:
		log.Fatal(err)
	}
	defer answer.Body.Close()
	fmt.Println(answer.Status)
}

// A program that says where everything is.
func ExampleNew() {
	c, err := client.New(
		client.WithAddress("broker.example.com:7443"),
		client.WithCA("/etc/broker/ca.crt"),
		client.WithCertificate("/etc/broker/tls.crt", "/etc/broker/tls.key"),
		client.WithUserAgent("biller/1.2"),
	)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	token, err := c.TokenSource("invoices").Token()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("good until", token.Expiry)
}

// A program that calls a gRPC server with the token.
func ExampleTokenSource_PerRPCCredentials() {
	c, err := client.New()
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	conn, err := grpc.NewClient("billing.example.com:443",
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS12})),
		grpc.WithPerRPCCredentials(c.TokenSource("invoices").PerRPCCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
}

// A job with a token of its own, which ends with the job. Each token it begins with
// lives for another 30 minutes.
func ExampleTokenSource_Revoke() {
	c, err := client.New()
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	job := c.TokenSource("invoices", client.WithDedicatedJob("import-2026-05-04"), client.WithMinLifetime(30*time.Minute))
	defer job.Close()
	web := &http.Client{Transport: job.Transport(nil, "vantage-eu.abbyy.com")}
	_ = web // do the work
	if confirmed, err := job.Revoke(context.Background()); err != nil {
		log.Print(err)
	} else if !confirmed {
		log.Print("the token works until it ends")
	}
}

// A program that hands each token on, to something that keeps it.
func ExampleTokenSource_Next() {
	c, err := client.New()
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	source := c.TokenSource("invoices")
	var current *client.Token
	for {
		next, err := source.Next(context.Background(), current)
		if err != nil {
			log.Print(err)
			time.Sleep(5 * time.Second)
			continue
		}
		log.Print("got ", next) // its id and end
		current = next
	}
}
