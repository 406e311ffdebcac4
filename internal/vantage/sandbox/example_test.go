package sandbox_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"

	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// A test asks for a token twice. The first answer is lost.
func Example() {
	vantage, err := sandbox.New(sandbox.Options{})
	if err != nil {
		fmt.Println(err)
		return
	}
	server := httptest.NewServer(vantage)
	defer server.Close()
	defer vantage.Close()

	if err := vantage.Fault(sandbox.Fault{Process: true, Status: http.StatusBadGateway}); err != nil {
		fmt.Println(err)
		return
	}
	for range 2 {
		response, err := http.PostForm(server.URL+"/auth2/connect/token", url.Values{
			"grant_type":    {"client_credentials"},
			"client_id":     {"invoices"},
			"client_secret": {vantage.ClientSecret("invoices")},
			"scope":         {"openid permissions global.wildcard"},
		})
		if err != nil {
			fmt.Println(err)
			return
		}
		response.Body.Close()
		fmt.Println(response.Status)
	}
	calls := vantage.Calls()
	fmt.Println(calls.ByGrant["client_credentials"], "issued:", calls.Issued["client_credentials"])
	// Output:
	// 502 Bad Gateway
	// 200 OK
	// map[fault:1 success:1] issued: 2
}
