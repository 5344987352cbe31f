package api

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/common/expfmt"
)

// newMetrics answers GET /metrics: what the Backend counts, and what this process costs.
func newMetrics(b Backend) http.Handler {
	reg := prometheus.NewRegistry()
	reg.MustRegister(&collector{b: b}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		families, err := reg.Gather() // with an error it still has all that is right
		if err != nil && len(families) == 0 {
			answer(w, http.StatusInternalServerError, refusal{Error: asError(err)})
			return
		}
		format := expfmt.NewFormat(expfmt.TypeTextPlain)
		w.Header().Set("Content-Type", string(format))
		enc := expfmt.NewEncoder(w, format)
		for _, f := range families {
			if enc.Encode(f) != nil {
				return // the scraper has gone
			}
		}
	})
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("patchbay_"+name, help, labels, nil)
}

// What a scrape shows. No label takes a value that traffic chooses: networks and ports are as many as the user has made, and reasons are an enum.
var (
	descInfo        = desc("info", "The version of the node; always 1.", "version")
	descNetworks    = desc("networks", "Networks.")
	descAttachments = desc("attachments", "Attachments, by whether frames flow.", "network", "state")
	descRxFrames    = desc("port_receive_frames_total", "Frames the switch received from the port.", "network", "port")
	descRxBytes     = desc("port_receive_bytes_total", "Bytes the switch received from the port.", "network", "port")
	descTxFrames    = desc("port_transmit_frames_total", "Frames the switch sent to the port.", "network", "port")
	descTxBytes     = desc("port_transmit_bytes_total", "Bytes the switch sent to the port.", "network", "port")
	descRxDropped   = desc("port_receive_dropped_total", "Frames received from the port and not sent on.", "network", "port")
	descTxRefused   = desc("port_transmit_refused_total", "Frames offered to the port and not taken.", "network", "port")
	descDrops       = desc("drops_total", "Frames not delivered, by reason; `patchbay drops` says what each means.", "network", "reason")
	descFlows       = desc("flows", "What NAT carries at the moment; tcp-opening are those of tcp that wait for an answer.", "network", "kind")
	descPublished   = desc("published_ports", "Published ports that are open.", "network")
	descFDB         = desc("fdb_entries", "MAC addresses the switch knows.", "network")
	descPeerUp      = desc("peer_up", "Whether the peer answers, or for a kernel, which cannot, whether frames ever came.", "network", "peer")
	descPeerSealed  = desc("peer_sealed", "Whether there are keys for the peer: nothing of a sealed network passes while there are none.", "network", "peer")
	descPeerRTT     = desc("peer_rtt_seconds", "The round trip to the peer; none while it is not known.", "network", "peer")
	descPeerLoss    = desc("peer_loss_ratio", "The part of what the peer sent lately that did not come.", "network", "peer")
	descPeerRx      = desc("peer_receive_frames_total", "Frames from the peer.", "network", "peer")
	descPeerRxBytes = desc("peer_receive_bytes_total", "Bytes of frames from the peer.", "network", "peer")
	descPeerTx      = desc("peer_transmit_frames_total", "Frames to the peer.", "network", "peer")
	descPeerTxBytes = desc("peer_transmit_bytes_total", "Bytes of UDP payload to the peer.", "network", "peer")
	descPeerDrops   = desc("peer_drops_total", "Frames from the peer or for it that were not delivered, by reason.", "network", "peer", "reason")
)

// collector asks the Backend at each scrape. It holds nothing, so what is removed is gone from the next scrape.
type collector struct{ b Backend }

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		descInfo, descNetworks, descAttachments, descRxFrames, descRxBytes, descTxFrames, descTxBytes, descRxDropped, descTxRefused, descDrops, descFlows, descPublished, descFDB,
		descPeerUp, descPeerSealed, descPeerRTT, descPeerLoss, descPeerRx, descPeerRxBytes, descPeerTx, descPeerTxBytes, descPeerDrops,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v int, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), labels...)
	}
	count := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	networks := c.b.Networks()
	gauge(descInfo, 1, c.b.Info().Version)
	gauge(descNetworks, len(networks))
	for _, n := range networks {
		for name, p := range portsByName(n.Ports) {
			count(descRxFrames, p.RxFrames, n.Name, name)
			count(descRxBytes, p.RxBytes, n.Name, name)
			count(descTxFrames, p.TxFrames, n.Name, name)
			count(descTxBytes, p.TxBytes, n.Name, name)
			count(descRxDropped, p.Dropped, n.Name, name)
			count(descTxRefused, p.TxRefused, n.Name, name)
		}
		gauge(descFlows, n.Flows.TCP, n.Name, "tcp")
		gauge(descFlows, n.Flows.TCPOpening, n.Name, "tcp-opening")
		gauge(descFlows, n.Flows.UDP, n.Name, "udp")
		gauge(descFlows, n.Flows.Ping, n.Name, "ping")
		gauge(descFlows, n.Flows.Published, n.Name, "published")
		gauge(descPublished, n.Flows.PublishedPorts, n.Name)
		c.collectNetwork(n.Name, gauge, count)
	}
	c.collectPeers(count, ch)
}

// collectPeers shows the tunnels.
func (c *collector) collectPeers(count func(*prometheus.Desc, uint64, ...string), ch chan<- prometheus.Metric) {
	peers, err := c.b.Peers("")
	if err != nil {
		return
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	for _, p := range peers {
		name := PeerRef(p.Host, p.Port)
		up := 0.0
		if p.State == PeerUp || p.State == PeerHeard {
			up = 1
		}
		gauge(descPeerUp, up, p.Network, name)
		sealed := 0.0
		if p.Sealed {
			sealed = 1
		}
		gauge(descPeerSealed, sealed, p.Network, name)
		if p.RTT > 0 {
			gauge(descPeerRTT, p.RTT, p.Network, name)
		}
		gauge(descPeerLoss, p.Loss, p.Network, name)
		count(descPeerRx, p.RxFrames, p.Network, name)
		count(descPeerRxBytes, p.RxBytes, p.Network, name)
		count(descPeerTx, p.TxFrames, p.Network, name)
		count(descPeerTxBytes, p.TxBytes, p.Network, name)
		for _, d := range p.Drops {
			count(descPeerDrops, d.Count, p.Network, name, d.Reason)
		}
	}
}

// collectNetwork shows what takes a question of its own; a network that was removed since the list was made has no answers.
func (c *collector) collectNetwork(name string, gauge func(*prometheus.Desc, int, ...string), count func(*prometheus.Desc, uint64, ...string)) {
	if l, err := c.b.Attachments(name); err == nil {
		states := map[State]int{StateUp: 0, StateLeaving: 0, StateWaiting: 0}
		for _, a := range l {
			states[a.State]++
		}
		for state, n := range states {
			gauge(descAttachments, n, name, string(state))
		}
	}
	if l, err := c.b.FDB(name); err == nil {
		gauge(descFDB, len(l), name)
	}
	if l, err := c.b.Drops(name); err == nil {
		for _, d := range l {
			count(descDrops, d.Count, name, d.Reason)
		}
	}
}

// portsByName adds up ports of one name, since a scraper takes each series once.
func portsByName(ports []Port) map[string]Port {
	m := make(map[string]Port, len(ports))
	for _, p := range ports {
		s := m[p.Name]
		s.RxFrames += p.RxFrames
		s.RxBytes += p.RxBytes
		s.TxFrames += p.TxFrames
		s.TxBytes += p.TxBytes
		s.Dropped += p.Dropped
		s.TxRefused += p.TxRefused
		m[p.Name] = s
	}
	return m
}
