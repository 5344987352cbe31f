package ipam_test

import (
	"context"
	"fmt"
	"net/netip"

	"patchbay/ipam"
)

func ExamplePool() {
	ctx := context.Background()
	p, err := ipam.NewPool(ctx, ipam.PoolConfig{Name: "mynet", Prefix: netip.MustParsePrefix("10.88.0.0/29")})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("gateway", p.Gateway(), "host", p.HostAlias())
	for _, att := range []string{"web", "db", "web"} {
		r, err := p.Lease(ctx, ipam.Request{Attachment: att})
		fmt.Println(att, r.Addr, err)
	}
	_, err = p.Lease(ctx, ipam.Request{Attachment: "mail", Addr: netip.MustParseAddr("10.88.0.2")})
	fmt.Println(err)
	fmt.Println(p.Release(ctx, "web"))
	// Output:
	// gateway 10.88.0.1 host 10.88.0.6
	// web 10.88.0.2 <nil>
	// db 10.88.0.3 <nil>
	// web 10.88.0.2 <nil>
	// network "mynet": lease 10.88.0.2 for mail: the address is held by another attachment, web: choose another address or stop it
	// <nil>
}

func ExampleHost_ChooseSubnet() {
	h := ipam.Host{Routes: func() ([]ipam.Route, error) {
		return []ipam.Route{
			{Prefix: netip.MustParsePrefix("0.0.0.0/0"), Interface: "eth0"},
			{Prefix: netip.MustParsePrefix("10.88.0.0/16"), Interface: "podman0"},
		}, nil
	}}
	p, err := h.ChooseSubnet()
	fmt.Println(p, err)
	fmt.Println(h.CheckSubnet(netip.MustParsePrefix("10.88.3.0/24")))
	// Output:
	// 10.89.0.0/24 <nil>
	// subnet 10.88.3.0/24: it clashes with the host's route to 10.88.0.0/16 on podman0: choose another, such as 10.89.0.0/24, or leave --subnet away
}

func ExampleParseSubnet() {
	_, err := ipam.ParseSubnet("10.88.0.1/24")
	fmt.Println(err)
	// Output:
	// subnet "10.88.0.1/24": it has host bits set: did you mean 10.88.0.0/24?
}
