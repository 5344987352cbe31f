package api

import (
	_ "embed"
	"encoding/json"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"patchbay/internal/wire"
)

//go:embed openapi.yaml
var openAPI []byte

// route is one line of the contract. openapi.yaml has the same, and a test compares them.
type route struct {
	method  string
	pattern string
	query   []string // parameters it takes
	serve   func(*Server, http.ResponseWriter, *http.Request) error
}

func (rt route) takes(param string) bool { return slices.Contains(rt.query, param) }

var routes = []route{
	{"GET", "/healthz", nil, (*Server).health},
	{"GET", "/metrics", nil, (*Server).getMetrics},
	{"GET", Prefix + "/openapi.yaml", nil, (*Server).getOpenAPI},
	{"GET", Prefix + "/info", nil, (*Server).getInfo},

	{"GET", Prefix + "/networks", nil, (*Server).listNetworks},
	{"POST", Prefix + "/networks", nil, (*Server).createNetwork},
	{"GET", Prefix + "/networks/{network}", nil, (*Server).getNetwork},
	{"DELETE", Prefix + "/networks/{network}", nil, (*Server).removeNetwork},
	{"GET", Prefix + "/networks/{network}/fdb", nil, (*Server).listFDB},
	{"GET", Prefix + "/networks/{network}/drops", nil, (*Server).listDrops},
	{"GET", Prefix + "/networks/{network}/capture", []string{"attachment", "filter", "snaplen", "count"}, (*Server).capture},

	{"GET", Prefix + "/attachments", []string{"network"}, (*Server).listAttachments},
	{"POST", Prefix + "/networks/{network}/attachments", nil, (*Server).attach},
	{"POST", Prefix + "/networks/{network}/attachments/{name}/resume", nil, (*Server).resume},
	{"GET", Prefix + "/networks/{network}/attachments/{name}", nil, (*Server).getAttachment},
	{"DELETE", Prefix + "/networks/{network}/attachments/{name}", nil, (*Server).detach},

	{"POST", Prefix + "/networks/{network}/attachments/{name}/publishes", nil, (*Server).addPublish},
	{"GET", Prefix + "/publishes", nil, (*Server).listPublishes},
	{"DELETE", Prefix + "/publishes/{id}", nil, (*Server).removePublish},

	{"GET", Prefix + "/peers", []string{"network"}, (*Server).listPeers},
	{"POST", Prefix + "/networks/{network}/peers", nil, (*Server).addPeer},
	{"DELETE", Prefix + "/networks/{network}/peers/{peer}", nil, (*Server).removePeer},
	{"POST", Prefix + "/networks/{network}/peers/{peer}/fdb", nil, (*Server).addPeerFDB},
	{"DELETE", Prefix + "/networks/{network}/peers/{peer}/fdb/{mac}", nil, (*Server).removePeerFDB},

	{"GET", Prefix + "/drops", nil, (*Server).listDrops},
	{"POST", Prefix + "/takeover", nil, (*Server).takeover},
}

func (s *Server) health(w http.ResponseWriter, _ *http.Request) error {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = io.WriteString(w, "ok\n")
	return nil
}

func (s *Server) getMetrics(w http.ResponseWriter, r *http.Request) error {
	s.metrics.ServeHTTP(w, r)
	return nil
}

func (s *Server) getOpenAPI(w http.ResponseWriter, _ *http.Request) error {
	w.Header().Set("Content-Type", "application/yaml")
	_, _ = w.Write(openAPI)
	return nil
}

func (s *Server) getInfo(w http.ResponseWriter, _ *http.Request) error {
	answer(w, http.StatusOK, s.cfg.Backend.Info())
	return nil
}

// ok answers with v unless there is an error; with a list that is never null.
func ok[T any](w http.ResponseWriter, status int, v T, err error) error {
	if err == nil {
		answer(w, status, v)
	}
	return err
}

func list[T any](w http.ResponseWriter, v []T, err error) error {
	if v == nil {
		v = []T{}
	}
	return ok(w, http.StatusOK, v, err)
}

func noContent(w http.ResponseWriter, err error) error {
	if err == nil {
		w.WriteHeader(http.StatusNoContent)
	}
	return err
}

func (s *Server) listNetworks(w http.ResponseWriter, _ *http.Request) error {
	return list(w, s.cfg.Backend.Networks(), nil)
}

func (s *Server) createNetwork(w http.ResponseWriter, r *http.Request) error {
	var spec NetworkSpec
	if err := s.decode(w, r, &spec); err != nil {
		return err
	}
	n, err := s.cfg.Backend.CreateNetwork(r.Context(), spec)
	return ok(w, http.StatusCreated, n, err)
}

func (s *Server) getNetwork(w http.ResponseWriter, r *http.Request) error {
	n, err := s.cfg.Backend.Network(r.PathValue("network"))
	return ok(w, http.StatusOK, n, err)
}

func (s *Server) removeNetwork(w http.ResponseWriter, r *http.Request) error {
	return noContent(w, s.cfg.Backend.RemoveNetwork(r.Context(), r.PathValue("network")))
}

func (s *Server) listFDB(w http.ResponseWriter, r *http.Request) error {
	l, err := s.cfg.Backend.FDB(r.PathValue("network"))
	return list(w, l, err)
}

func (s *Server) listDrops(w http.ResponseWriter, r *http.Request) error {
	l, err := s.cfg.Backend.Drops(r.PathValue("network")) // "" on the route without one
	return list(w, l, err)
}

func (s *Server) listAttachments(w http.ResponseWriter, r *http.Request) error {
	l, err := s.cfg.Backend.Attachments(r.URL.Query().Get("network"))
	return list(w, l, err)
}

func (s *Server) getAttachment(w http.ResponseWriter, r *http.Request) error {
	a, err := s.cfg.Backend.Attachment(r.PathValue("network"), r.PathValue("name"))
	return ok(w, http.StatusOK, a, err)
}

func (s *Server) detach(w http.ResponseWriter, r *http.Request) error {
	return noContent(w, s.cfg.Backend.Detach(r.Context(), r.PathValue("network"), r.PathValue("name")))
}

func (s *Server) listPublishes(w http.ResponseWriter, _ *http.Request) error {
	return list(w, s.cfg.Backend.Publishes(), nil)
}

func (s *Server) addPublish(w http.ResponseWriter, r *http.Request) error {
	var spec PublishSpec
	if err := s.decode(w, r, &spec); err != nil {
		return err
	}
	p, err := s.cfg.Backend.AddPublish(r.Context(), r.PathValue("network"), r.PathValue("name"), spec)
	return ok(w, http.StatusCreated, p, err)
}

func (s *Server) removePublish(w http.ResponseWriter, r *http.Request) error {
	return noContent(w, s.cfg.Backend.RemovePublish(r.Context(), r.PathValue("id")))
}

func (s *Server) listPeers(w http.ResponseWriter, r *http.Request) error {
	l, err := s.cfg.Backend.Peers(r.URL.Query().Get("network"))
	return list(w, l, err)
}

func (s *Server) addPeer(w http.ResponseWriter, r *http.Request) error {
	var spec PeerSpec
	if err := s.decode(w, r, &spec); err != nil {
		return err
	}
	p, err := s.cfg.Backend.AddPeer(r.Context(), r.PathValue("network"), spec)
	return ok(w, http.StatusCreated, p, err)
}

func (s *Server) removePeer(w http.ResponseWriter, r *http.Request) error {
	return noContent(w, s.cfg.Backend.RemovePeer(r.Context(), r.PathValue("network"), r.PathValue("peer")))
}

func (s *Server) addPeerFDB(w http.ResponseWriter, r *http.Request) error {
	var spec FDBSpec
	if err := s.decode(w, r, &spec); err != nil {
		return err
	}
	p, err := s.cfg.Backend.AddPeerFDB(r.Context(), r.PathValue("network"), r.PathValue("peer"), spec.MAC)
	return ok(w, http.StatusCreated, p, err)
}

func (s *Server) removePeerFDB(w http.ResponseWriter, r *http.Request) error {
	var mac wire.MAC
	if err := mac.UnmarshalText([]byte(r.PathValue("mac"))); err != nil {
		return Errorf(CodeInvalid, "write six hexadecimal bytes, such as 02:00:5e:10:00:01", "static entry %q is no MAC", abbreviate(r.PathValue("mac")))
	}
	p, err := s.cfg.Backend.RemovePeerFDB(r.Context(), r.PathValue("network"), r.PathValue("peer"), mac)
	return ok(w, http.StatusOK, p, err)
}

// captureError is the trailer in which a capture says why it ended early: a refusal as JSON.
const captureError = "Patchbay-Error"

// capture streams pcapng until the client goes, the capture ends, or the server does.
func (s *Server) capture(w http.ResponseWriter, r *http.Request) error {
	spec, err := captureSpec(r)
	if err != nil {
		return err
	}
	run, err := s.cfg.Backend.Capture(r.PathValue("network"), spec)
	if err != nil {
		return err
	}
	ctx, stop := s.untilEnd(r)
	defer stop()
	w.Header().Set("Content-Type", "application/x-pcapng")
	w.Header().Set("Trailer", captureError)
	w.WriteHeader(http.StatusOK)
	f := flusher{w, http.NewResponseController(w)}
	if err := f.rc.Flush(); err != nil { // a client knows by the header that the capture has begun
		return nil
	}
	err = run(ctx, f)
	select {
	case <-servingOf(r).ending:
		err = Errorf(CodeUnavailable, "start the capture again", "the node ends")
	default:
	}
	if err != nil && r.Context().Err() == nil {
		b, _ := json.Marshal(refusal{Error: asError(err)})
		w.Header().Set(captureError, string(b))
	}
	return nil
}

// flusher hands each write on at once: Wireshark at the other end of a pipe is live.
type flusher struct {
	w  io.Writer
	rc *http.ResponseController
}

func (f flusher) Write(b []byte) (int, error) {
	n, err := f.w.Write(b)
	if err == nil {
		err = f.rc.Flush()
	}
	return n, err
}

// captureSpec reads the parameters.
func captureSpec(r *http.Request) (CaptureSpec, error) {
	q := r.URL.Query()
	spec := CaptureSpec{Attachment: q.Get("attachment"), Filter: q.Get("filter")}
	for name, to := range map[string]*int{"snaplen": &spec.SnapLen, "count": &spec.Count} {
		text := strings.TrimSpace(q.Get(name))
		if text == "" {
			continue
		}
		n, err := strconv.Atoi(text)
		if err != nil {
			return spec, Errorf(CodeInvalid, "give a number", "capture: %s=%q", name, abbreviate(text))
		}
		*to = n
	}
	return spec, spec.Validate()
}
